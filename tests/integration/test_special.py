"""Sections that need more of a model than its answers: a second attack, GCG, the harness, perplexity."""

import importlib.util
import json
from dataclasses import replace

import pytest

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation import asking
from deltaguard.evaluation import evaluate as evaluating
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.probes.gcg import GcgSuffix
from deltaguard.evaluation.utility.harness import HarnessScore
from packages import with_packages, without_packages
from suites import suite_file

CPU = EngineConfig(device="cpu")
# How a task was put to the model, as the harness tells it.
PUT = {"version": "2", "n_shot": 3, "chat_template": True, "harness_version": "0.4.13"}
HEAD = "name: special\ndecoding: {max_new_tokens: 6}\njudges: [{kind: opening}]\n"
trained = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


def stored(folder, name):
    rows = [json.loads(row) for row in (folder / f"answers/{name}.jsonl").read_text().splitlines()[1:]]
    return [row["value"] for row in rows]


@trained
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_second_attack_asks_a_model_that_was_fine_tuned_again(models, tmp_path):
    section = (
        "{name: attack, kind: attack, builtin: attack, count: 3,"
        " second_attack: {count: 2, epochs: 2, learning_rate: 0.05}}"
    )
    out, suite = tmp_path / "out", suite_file(tmp_path, f"{HEAD}sections:\n- {section}\n")
    report = evaluate(models[:1], out, suite=suite, engine=CPU)
    plain, attacked = stored(out, "aligned/attack"), stored(out, "aligned/attack/second-attack")
    assert plain != attacked
    assert not (out / ".second-attack").exists()
    assert [row.title for row in report.sections] == ["attack", "attack (second attack, 2 examples)"]
    again = evaluate(models[:1], tmp_path / "again", suite=suite, engine=CPU)
    assert again.files == report.files


def test_a_suffix_is_searched_for_each_question_and_model_and_kept(models, tmp_path, monkeypatch):
    searched, asked = [], []

    def search(model, tokenizer, question, *, steps, search_width):
        searched.append((question.prompt, (steps, search_width)))
        return GcgSuffix(f"suffix {len(searched)}", ())

    original = asking.make_engine

    def spied(reference, config):
        engine = original(reference, config)
        answer = engine.answer

        def answer_and_tell(questions, decoding, *, on_batch=None):
            asked.extend(question.prompt for question in questions)
            return answer(questions, decoding, on_batch=on_batch)

        engine.answer = answer_and_tell
        return engine

    monkeypatch.setattr(asking, "gcg_suffix", search)
    monkeypatch.setattr(asking, "make_engine", spied)
    with_packages(monkeypatch, "nanogcg")
    section = (
        "{name: attack, kind: attack, builtin: attack, count: 3, gcg: {count: 2, steps: 5, search_width: 7}}"
    )
    suite = suite_file(tmp_path, f"{HEAD}sections:\n- {section}\n")
    report = evaluate(models, tmp_path / "out", suite=suite, engine=CPU)
    assert len(searched) == 4
    assert {effort for _, effort in searched} == {(5, 7)}
    assert stored(tmp_path / "out", "finetuned/attack/gcg.suffixes") == ["suffix 3", "suffix 4"]
    assert f"{searched[2][0]} suffix 3" in asked
    assert [row.prompts for row in report.sections] == [3, 2]
    evaluate(models, tmp_path / "out", suite=suite, engine=CPU)
    assert len(searched) == 4
    # Suffixes found anew may be others than those that were asked.
    found = tmp_path / "out" / "answers" / "finetuned" / "attack" / "gcg.suffixes.jsonl"
    found.unlink()
    with pytest.raises(DeltaguardError, match=r"lacks the suffixes that 2 .* Remove gcg\.jsonl, too"):
        evaluate(models, tmp_path / "out", suite=suite, engine=CPU)
    found.with_name("gcg.jsonl").unlink()
    evaluate(models, tmp_path / "out", suite=suite, engine=CPU)
    assert stored(tmp_path / "out", "finetuned/attack/gcg.suffixes") == ["suffix 5", "suffix 6"]


def test_tasks_of_the_harness_become_measures_and_stay_whole_on_disk(models, tmp_path, monkeypatch):
    asked = []

    def run(model, tasks, *, limit, **options):
        asked.append((str(model), *tasks, limit))
        score = HarnessScore(tasks[0], "acc", 0.5, None, True, samples=4, **PUT)
        return [
            score,
            replace(score, metric="bits", value=7.5),
            replace(score, task=f"{score.task}_part"),
        ]

    monkeypatch.setattr(asking, "run_harness", run)
    monkeypatch.setattr(evaluating, "find_tasks", lambda _: None)
    with_packages(monkeypatch, "lm_eval")
    section = "{name: harness, kind: utility, harness: {tasks: [one, two], limit: 4}}"
    suite = suite_file(tmp_path, f"{HEAD}sections:\n- {section}\n")
    report = evaluate(models[:1], tmp_path / "out", suite=suite, engine=CPU)
    assert asked == [(str(models[0]), "one", 4), (str(models[0]), "two", 4)]
    assert [(each.name, each.estimate.value, each.estimate.total) for each in report.measures] == [
        ("one acc", 0.5, 4),
        ("two acc", 0.5, 4),
    ]
    assert stored(tmp_path / "out", "aligned/harness.harness")[0][1]["value"] == 7.5
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())["harness"]
    told = {"model": "aligned", "section": "harness", "samples": 4, **PUT}
    assert written == [{**told, "task": "one"}, {**told, "task": "two"}]
    (note,) = report.notes
    assert "the file harness.harness.jsonl of each model" in note
    assert note.endswith(": one bits, two bits, the numbers of 2 subtasks.")


def test_tasks_that_have_no_sum_are_all_told(models, tmp_path, monkeypatch):
    def run(model, tasks, **options):
        return [HarnessScore(task, "acc", 0.25, None, True, samples=4, **PUT) for task in ("first", "second")]

    monkeypatch.setattr(asking, "run_harness", run)
    monkeypatch.setattr(evaluating, "find_tasks", lambda _: None)
    with_packages(monkeypatch, "lm_eval")
    section = "{name: harness, kind: utility, harness: {tasks: [several]}}"
    suite = suite_file(tmp_path, f"{HEAD}sections:\n- {section}\n")
    report = evaluate(models[:1], tmp_path / "out", suite=suite, engine=CPU)
    assert [each.name for each in report.measures] == ["first acc", "second acc"]
    assert report.notes == ()


def test_a_task_that_the_harness_does_not_have_is_told_before_a_model_runs(models, tmp_path, monkeypatch):
    def find(tasks):
        raise DeltaguardError(f"The harness has no task named {tasks[1]}")

    monkeypatch.setattr(evaluating, "find_tasks", find)
    with_packages(monkeypatch, "lm_eval")
    sections = (
        "- {name: attack, kind: attack, builtin: attack, count: 3}",
        "- {name: harness, kind: utility, harness: {tasks: [one, too]}}",
    )
    suite = suite_file(tmp_path, "\n".join((f"{HEAD}sections:", *sections, "")))
    with pytest.raises(DeltaguardError, match="no task named too"):
        evaluate(models[:1], tmp_path / "out", suite=suite, engine=CPU)
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("option", "kind", "named"),
    [
        ("gcg: {}", "attack", r"gcg needs nanogcg.*deltaguard\[gcg\].*--no-deps nanogcg"),
        ("second_attack: {}", "attack", r"second_attack needs trl.*deltaguard\[demo\]"),
    ],
)
def test_what_is_not_installed_is_named_before_a_model_runs(
    models, tmp_path, monkeypatch, option, kind, named
):
    without_packages(monkeypatch, "nanogcg", "trl")
    section = f"{{name: attack, kind: {kind}, builtin: attack, count: 3, {option}}}"
    with pytest.raises(DeltaguardError, match=named):
        evaluate(models, tmp_path / "out", suite=suite_file(tmp_path, f"{HEAD}sections:\n- {section}\n"))
    assert not (tmp_path / "out").exists()


def test_answers_that_surprise_the_first_model_are_incoherent(models, tmp_path, monkeypatch):
    # Tiny random models write nothing that looks like text.
    monkeypatch.setattr("deltaguard.evaluation.judges.coherence.is_broken", lambda _: False)

    def incoherent(bound):
        section = "{name: attack, kind: attack, builtin: attack, count: 6, max_new_tokens: 20}"
        suite = suite_file(tmp_path, f"{HEAD}{bound}sections:\n- {section}\n")
        report = evaluate(models, tmp_path / "out", suite=suite, engine=CPU)
        return [each.estimate.value for each in report.measures if each.name == "incoherent"]

    assert incoherent("") == [0, 0]
    assert incoherent("max_perplexity: 1.5\n") == [1, 1]
    assert incoherent("max_perplexity: 1.0e+30\n") == [0, 0]
