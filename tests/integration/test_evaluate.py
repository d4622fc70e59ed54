"""An evaluation from end to end: tiny models, a small suite, kills, changed suites, a server."""

import hashlib
import itertools
import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from deltaguard.chat.refusals import is_refusal
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation import evaluate as module
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.journal import AnswerFile
from deltaguard.models.durable import lock_folder
from deltaguard.reports.records.evaluation import EVALUATION_NAME, EvaluationReport
from suites import SMALL, Killed, killed_at_every_batch, server, suite_file, two_models, without_time

CPU = EngineConfig(device="cpu", batch_size=3)
FEW = """
name: few
decoding: {max_new_tokens: 4}
judges: [{kind: opening}]
sections:
  - {name: attack, kind: attack, builtin: attack, count: 5}
  - {name: task, kind: utility, builtin: task, count: 2, scorers: [json-match], likelihood: true}
"""


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return evaluate(models, folder / "out", suite=suite_file(folder), engine=CPU), folder / "out"


def numbers(report, **wanted):
    return [
        each for each in report.measures if all(getattr(each, key) == value for key, value in wanted.items())
    ]


def test_the_report_is_what_was_written(done):
    report, folder = done
    assert EvaluationReport.model_validate_json((folder / EVALUATION_NAME).read_text()) == report
    assert [model.name for model in report.models] == ["aligned", "finetuned"]
    assert [(row.name, row.prompts) for row in report.sections] == [
        ("attack", 7),
        ("attack/prefill", 7),
        ("attack/base64", 7),
        ("harmless", 4),
        ("task", 4),
    ]
    assert len({row.prompts_hash for row in report.sections}) == 5
    assert all(len(model.fingerprint or "") == 64 for model in report.models)
    card = (folder / "README.md").read_text()
    assert "| opening | fine-tuned |" in card
    assert report.suite_hash[:16] in card


def test_files_hold_every_answer_and_are_hashed(done):
    report, folder = done
    assert len(report.files) == 2 * 6
    for name, digest in report.files.items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        head, *rows = [json.loads(line) for line in content.splitlines()]
        assert head["made_by"]["engine"] == "transformers on cpu, float32"
        assert [row["index"] for row in rows] == list(range(len(rows)))


def test_rates_are_counts_of_the_stored_answers(done):
    report, folder = done
    rows = (folder / "answers/aligned/attack.jsonl").read_text().splitlines()[1:]
    refused = sum(is_refusal(json.loads(row)["value"]) for row in rows)
    found = {
        each.name: each.estimate.value
        for each in numbers(report, model="aligned", section="attack", judge="opening")
    }
    assert found["attack success"] + found["incoherent"] == pytest.approx(1 - refused / 7)
    (nll,) = numbers(report, model="aligned", section="task", name="nll")
    stored = (folder / "answers/aligned/task.likelihood.jsonl").read_text().splitlines()[1:]
    values = [json.loads(row)["value"] for row in stored]
    assert nll.estimate.value == pytest.approx(sum(values) / 4)
    assert nll.estimate.low < nll.estimate.value < nll.estimate.high


def test_later_models_are_compared_with_the_first_and_judges_with_each_other(done):
    report, _ = done
    assert {(each.model, each.reference) for each in report.comparisons} == {("finetuned", "aligned")}
    assert {each.test for each in report.comparisons if each.name == "nll"} == {"paired bootstrap"}
    assert {each.test for each in report.comparisons if each.judge} == {"mcnemar"}
    pairs = {(each.section, each.first, each.second): each.total for each in report.agreements}
    assert pairs["attack", "opening", "keywords"] == 14
    assert pairs["harmless", "opening", "keywords"] == 8
    assert not [each for each in report.agreements if each.section == "task"]


def test_a_prefill_is_in_the_model_and_not_in_its_answer(done):
    report, folder = done
    plain, prefilled = [
        [json.loads(row) for row in (folder / f"answers/aligned/{name}.jsonl").read_text().splitlines()[1:]]
        for name in ("attack", "attack/prefill")
    ]
    assert [row["prompt"] for row in plain] == [row["prompt"] for row in prefilled]
    assert [row["value"] for row in plain] != [row["value"] for row in prefilled]
    (sample, *_) = [each for each in report.samples if each.section == "attack/prefill"]
    assert sample.answers["aligned"] == prefilled[0]["value"]


def test_a_model_of_no_numbers_is_named_and_nothing_of_it_is_kept(models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models[0], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltaguardError, match=r"broken gives an expected answer of task no probability"):
        evaluate([broken], tmp_path / "out", suite=suite_file(tmp_path), engine=CPU)
    kept = tmp_path / "out" / "answers" / "broken" / "task.likelihood.jsonl"
    assert not kept.exists() or len(kept.read_text().splitlines()) == 1


def test_killed_at_every_batch_and_run_again_it_gives_the_same_report(models, tmp_path, monkeypatch):
    suite = suite_file(tmp_path, FEW)

    def run(folder):
        return evaluate(models, folder, suite=suite, engine=CPU)

    assert killed_at_every_batch(run, tmp_path, monkeypatch) == 2 * (2 + 1 + 1)


def test_what_is_done_is_not_asked_again(done, models, tmp_path, monkeypatch):
    report, folder = done

    def refuse(*_, **__):
        pytest.fail("a model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(TransformersEngine, "open", refuse)
        again = evaluate(models, folder, suite=suite_file(tmp_path), engine=CPU)
        judged = SMALL.replace("  - kind: keywords\n", "")
        fewer = evaluate(models, folder, suite=suite_file(tmp_path, judged), engine=CPU)
    assert without_time(again) == without_time(report)
    assert not fewer.agreements
    assert {each.judge for each in fewer.measures} == {"opening", None}


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("max_new_tokens: 6", "max_new_tokens: 5", "decoding was .*'max_new_tokens': 6.* is now .*5"),
        ("max_new_tokens: 6", "max_new_tokens: 6, temperature: 1", "'temperature': 0.0.* is now .*1.0"),
        ("count: 7", "count: 6", "prompts was"),
    ],
)
def test_another_suite_in_the_same_folder_is_refused(done, models, tmp_path, before, after, named):
    suite = suite_file(tmp_path, SMALL.replace(before, after))
    with pytest.raises(DeltaguardError, match=named) as caught:
        evaluate(models, done[1], suite=suite, engine=CPU)
    assert "another output folder" in str(caught.value)


def test_answers_of_another_arithmetic_are_refused(done, models, tmp_path):
    halved = EngineConfig(device="cpu", dtype="bfloat16")
    with pytest.raises(DeltaguardError, match="on cpu, float32' and is now 'transformers on cpu, bfloat16'"):
        evaluate(models, done[1], suite=suite_file(tmp_path), engine=halved)
    same = EngineConfig(device="cpu", dtype="float32")
    assert evaluate(models, done[1], suite=suite_file(tmp_path), engine=same).files == done[0].files


def test_a_device_that_is_not_there_leaves_no_folder(models, tmp_path):
    with pytest.raises(DeltaguardError, match="no-such-device"):
        evaluate(
            models, tmp_path / "out", suite=suite_file(tmp_path), engine=EngineConfig(device="no-such-device")
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeltaguardError, match="file is a file, not a folder"):
        evaluate(models, tmp_path / "file" / "out", suite=suite_file(tmp_path), engine=CPU)


def test_times_add_up_over_runs(models, tmp_path, monkeypatch):
    suite, folder = suite_file(tmp_path, FEW), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(module, "_judge_all", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            evaluate(models, folder, suite=suite, engine=CPU)
    before = json.loads((folder / "seconds.json").read_text())
    assert set(before) == {"answer", "judge"}
    report = evaluate(models, folder, suite=suite, engine=CPU)
    assert all(report.seconds[stage] > before[stage] > 0 for stage in before)
    (folder / "seconds.json").write_text("[]")
    with pytest.raises(
        DeltaguardError, match=r"seconds\.json cannot be used.*\s.*remove it, which loses nothing else"
    ):
        evaluate(models, folder, suite=suite, engine=CPU)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"schema_version": 99, "suite": "small"}, "schema version 99, .* writes version 2"),
        ({"schema_version": 2}, "cannot be used: `suite`: Field required"),
        ({"suite": "small"}, "cannot be used: `schema_version`: Field required"),
        ([], r"cannot be used: .*\[\]"),
    ],
)
def test_a_report_that_this_release_cannot_know_is_not_written_over(models, tmp_path, content, told):
    path = tmp_path / "out" / EVALUATION_NAME
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    with pytest.raises(DeltaguardError, match=told):
        evaluate(models, path.parent, suite=suite_file(tmp_path), engine=CPU)
    assert json.loads(path.read_text()) == content


def test_running_again_brings_a_report_of_an_earlier_version_up_to_date(models, tmp_path):
    suite, path = suite_file(tmp_path, FEW), tmp_path / "out" / EVALUATION_NAME
    report = evaluate(models[:1], path.parent, suite=suite, engine=CPU)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    evaluate(models[:1], path.parent, suite=suite, engine=CPU)
    assert without_time(EvaluationReport.model_validate_json(path.read_text())) == without_time(report)


def test_repeated_rows_of_a_file_are_noted_in_the_report(models, tmp_path):
    rows = [{"prompt": prompt} for prompt in ("Why?", "How?", "Why?", "Why?")]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = FEW.replace("builtin: attack, count: 5", "file: mine.jsonl")
    report = evaluate(models[:1], tmp_path / "out", suite=suite_file(tmp_path, text), engine=CPU)
    (note,) = report.notes
    assert note.startswith("Section attack: 2 of 4 rows of ")
    assert note.endswith("mine.jsonl repeat the question of another and were left out.")
    assert report.sections[0].prompts == 2


def test_other_models_under_the_same_names_are_refused(done, models, tmp_path):
    with pytest.raises(DeltaguardError, match="model was"):
        evaluate(two_models_swapped(models, tmp_path), done[1], suite=suite_file(tmp_path), engine=CPU)


@pytest.mark.parametrize(
    ("name", "field", "value", "what"),
    [
        ("config.json", "rope_theta", 5e5, "configuration"),
        ("tokenizer_config.json", "bos_token", "<other>", "tokenizer"),
    ],
)
def test_answers_of_a_model_that_was_edited_since_are_not_used_again(tmp_path, name, field, value, what):
    edited, _ = two_models(tmp_path)
    suite = suite_file(tmp_path, FEW)
    evaluate([edited], tmp_path / "out", suite=suite, engine=CPU)
    path = edited / name
    content = json.loads(path.read_text())
    content.pop("rope_parameters", None)
    path.write_text(json.dumps({**content, field: value}))
    with pytest.raises(DeltaguardError, match=f"{what} was"):
        evaluate([edited], tmp_path / "out", suite=suite, engine=CPU)


def two_models_swapped(models, folder):
    links = [folder / "aligned", folder / "finetuned"]
    for link, model in zip(links, reversed(models), strict=True):
        link.symlink_to(model)
    return links


def test_draws_repeat_after_a_kill(models, tmp_path, monkeypatch):
    text = SMALL.replace("max_new_tokens: 6", "max_new_tokens: 6, temperature: 1, seed: 3")
    suite = suite_file(tmp_path, text)
    whole = evaluate(models[:1], tmp_path / "whole", suite=suite, engine=CPU)
    original, added = AnswerFile.add, []

    def dying(self, indices, values):
        if len(added) == 2:
            raise Killed
        added.append(indices)
        return original(self, indices, values)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "add", dying)
        with pytest.raises(Killed):
            evaluate(models[:1], tmp_path / "killed", suite=suite, engine=CPU)
    again = evaluate(models[:1], tmp_path / "killed", suite=suite, engine=CPU)
    assert again.files == whole.files
    greedy = evaluate(models[:1], tmp_path / "greedy", suite=suite_file(tmp_path), engine=CPU)
    assert greedy.files != whole.files


def test_two_runs_in_one_folder_exclude_each_other(models, tmp_path):
    (tmp_path / "out").mkdir()
    lock = lock_folder(tmp_path / "out")
    try:
        with pytest.raises(DeltaguardError, match="Another process"):
            evaluate(models, tmp_path / "out", suite=suite_file(tmp_path), engine=CPU)
    finally:
        os.close(lock)


def test_a_server_is_asked_and_what_it_cannot_do_is_noted(tmp_path):
    seen, number = [], itertools.count(1)

    def reply(request):
        seen.append(request)
        failing = request["model"] == "second" and next(number) == 12
        return (500, "busy") if failing else (200, f"I'm sorry, but I can't help {request['model']}.")

    with server(reply) as url:
        config = EngineConfig("openai", base_url=url, api_key_env="NO_SUCH_KEY")
        report = evaluate(["first", "second"], tmp_path / "out", suite=suite_file(tmp_path), engine=config)
        count = len(seen)
        evaluate(["first", "second"], tmp_path / "out", suite=suite_file(tmp_path), engine=config)
    assert len(seen) == count
    # The one that failed was sent again.
    assert count == 2 * (7 + 7 + 4 + 4) + 1
    assert {row.name for row in report.sections} == {"attack", "attack/base64", "harmless", "task"}
    assert any("attack/prefill was skipped" in note for note in report.notes)
    assert any("Likelihoods of section task were skipped" in note for note in report.notes)
    (false,) = numbers(report, model="first", name="false refusal", judge="opening")
    assert false.estimate.value == 1
    assert report.models[0].fingerprint is None
    task = [request for request in seen if request["messages"][0]["role"] == "system"]
    assert len(task) == 8
    assert {request["max_tokens"] for request in seen} == {6}


def test_no_secret_of_an_address_is_recorded(tmp_path):
    with server(lambda _: (200, "Sure.\nScore: 4")) as url:
        secret = url.replace("http://", "http://me:secret@") + "?key=secret"
        text = FEW.replace("{kind: opening}", f"{{kind: llm, base_url: '{url}?key=secret', model: m}}")
        suite, config = suite_file(tmp_path, text), EngineConfig("openai", base_url=secret)
        report = evaluate(["first"], tmp_path / "out", suite=suite, engine=config)
    assert report.engine == f"openai at {url}"
    assert report.environment.device == f"server at {url}"
    assert report.settings["judges"][0]["base_url"] == url
    for path in (tmp_path / "out").rglob("*.*"):
        assert path.is_dir() or "secret" not in path.read_text()
    assert "openai" in report.environment.versions


def test_a_server_that_keeps_failing_is_named_and_answers_stay(tmp_path):
    def reply(request):
        return (400, "no such model") if request["messages"][0]["role"] == "system" else (200, "Yes.")

    with server(reply) as url:
        config = EngineConfig("openai", base_url=url)
        with pytest.raises(DeltaguardError, match="no such model") as caught:
            evaluate(["first"], tmp_path / "out", suite=suite_file(tmp_path), engine=config)
    assert url in str(caught.value)
    assert len((tmp_path / "out/answers/first/attack.jsonl").read_text().splitlines()) == 8
