"""Suites: what may be written in them, what is found before any model runs, and what an engine can do."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import get_args

import pytest

from deltaguard.chat.conversations import bucket, harmless_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.datasets.load import DATASETS
from deltaguard.evaluation.exchange import FollowUp, Question
from deltaguard.evaluation.probes.wrappers import LANGUAGES, translated_prompts
from deltaguard.evaluation.suites.parts import Part, builtin_questions, fit, resolve
from deltaguard.evaluation.suites.suite import SUITES, Builtin, read_suite
from deltaguard.finetuning.mixtures import everyday_prompts
from packages import without_packages
from suites import SMALL, suite_file

OFFLINE = [name for name in SUITES if name != "full"]
ATTACK = "{name: a, kind: attack, builtin: attack, count: 3"


def suite(folder, sections, judges="[{kind: opening}]"):
    return suite_file(folder, f"name: mine\njudges: {judges}\nsections:\n- {sections}\n")


@pytest.mark.parametrize("name", SUITES)
def test_suites_that_come_along_can_be_read_and_copied(name, tmp_path):
    from importlib.resources import files

    text = (files("deltaguard.evaluation.suites") / f"{name}.yaml").read_text()
    assert read_suite(suite_file(tmp_path, text)) == read_suite(name)
    assert read_suite(name).name == name
    assert read_suite(name).description


@pytest.mark.parametrize("name", OFFLINE)
def test_they_run_offline_with_held_out_prompts(name):
    parts, notes = resolve(read_suite(name))
    assert not notes
    for part in parts:
        assert len(part.plain) == len(part.questions) > 0
        if part.kind == "attack":
            assert {bucket(prompt) for prompt in part.plain} <= set(range(34, 60))


def test_a_question_is_known_by_all_that_belongs_to_it_and_by_no_more():
    def known(**more):
        part = Part("p", "utility", "p", "own", (Question("6 * 7?", expected="42", **more),), ("6 * 7?",))
        return part.prompts_hash

    # What folders of answers hold: of a conversation of one turn nothing but its own fields counts.
    own = [{"expected": "42", "prefill": "", "prompt": "6 * 7?", "system": None}]
    assert known() == sha256(json.dumps(own).encode()).hexdigest()
    then = [FollowUp("And twice that?"), FollowUp("And twice that?", "84"), FollowUp("And half of it?")]
    assert len({known(), *(known(follow_up=each) for each in then), known(system="")}) == 5


@pytest.mark.parametrize(("kind", "more"), [("harmless", ""), ("utility", ", grade: true")])
def test_second_turns_are_asked_where_answers_are_graded_and_nowhere_without_a_word(tmp_path, kind, more):
    (tmp_path / "set.jsonl").write_text('{"turns": ["Why?", "And then?"], "reference": ["So.", "Thus."]}\n')
    section = f"{{name: talk, kind: {kind}, dataset: mt-bench, path: set.jsonl{more}}}"
    ((part,), notes) = resolve(read_suite(suite(tmp_path, section)))
    if more:
        assert part.questions == (Question("Why?", expected="So.", follow_up=FollowUp("And then?", "Thus.")),)
        assert part.follow_ups == (FollowUp("And then?", "Thus."),)
        assert not notes
    else:
        assert part.questions == (Question("Why?", expected="So."),)
        assert part.follow_ups == ()
        (note,) = notes
        assert note.startswith("Section talk: of each conversation the first question alone is asked")


def test_a_part_does_not_mix_conversations_of_one_and_of_two_turns():
    questions = (Question("Why?"), Question("How?", follow_up=FollowUp("And then?")))
    part = Part("p", "utility", "p", "own", questions, ("Why?", "How?"))
    with pytest.raises(ValueError, match="1 of 2 questions of p is followed by another"):
        _ = part.follow_ups


def test_the_documentation_counts_the_sets_that_come_along():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*?(\d+)", text.split("| `builtin` |")[1], re.MULTILINE)[:7])
    assert {name: int(count) for name, count in rows.items()} == {
        name: len(builtin_questions(name, None, 0)) for name in get_args(Builtin)
    }
    assert all(f"`{name}`" in text for name in DATASETS)


def test_nothing_that_comes_along_is_asked_in_training():
    trained = {row.prompt for row in (*everyday_prompts(), *harmless_prompts("training"))}
    for name in OFFLINE:
        for part in resolve(read_suite(name))[0]:
            assert not trained & {question.prompt for question in part.questions}


def test_judges_see_translated_requests_in_english():
    parts = {part.name: part for part in resolve(read_suite("safety"))[0]}
    translated = parts["translated"]
    originals = {row.prompt: row.original for each in LANGUAGES for row in translated_prompts(each)}
    assert len(originals) == 60
    assert translated.plain == tuple(originals[question.prompt] for question in translated.questions)
    assert set(translated.plain) < set(parts["attack"].plain)


def test_the_quick_suite_has_the_sizes_it_promises():
    sizes = {part.name: len(part.questions) for part in resolve(read_suite("quick"))[0]}
    assert (sizes["attack"], sizes["harmless"]) == (100, 60)


def test_counts_draw_the_same_prompts_and_fewer_are_among_more(tmp_path):
    def prompts(more):
        return resolve(read_suite(suite(tmp_path, ATTACK.replace("count: 3", more) + "}")))[0][0].plain

    assert prompts("count: 9") == prompts("count: 9")
    assert set(prompts("count: 3")) < set(prompts("count: 9"))
    assert prompts("count: 9, seed: 1") != prompts("count: 9")


def test_a_probe_rewrites_what_is_asked_and_keeps_what_is_judged(tmp_path):
    parts, _ = resolve(read_suite(suite(tmp_path, ATTACK + ", probes: [base64, prefill]}")))
    plain, base64, prefill = parts
    assert [part.name for part in parts] == ["a", "a/base64", "a/prefill"]
    assert plain.plain == base64.plain == prefill.plain
    assert not {q.prompt for q in plain.questions} & {q.prompt for q in base64.questions}
    assert all(question.prefill for question in prefill.questions)
    assert len({part.prompts_hash for part in parts}) == 3


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        (ATTACK + ", coutn: 3}", "sections.0.coutn"),
        ("{name: a, kind: attak, builtin: attack}", "sections.0.kind"),
        ("{name: a, kind: attack, builtin: atack}", "sections.0.builtin"),
        ("{name: a, kind: attack, builtin: dial}", "sections.0.builtin"),
        ("{name: A b, kind: attack, builtin: attack}", "sections.0.name"),
        ("{name: a, kind: attack}", "exactly one of builtin, dataset, file, harness; given: none"),
        (ATTACK + ", dataset: gsm8k}", "given: builtin, dataset"),
        (ATTACK + ", path: x.csv}", "path says where a dataset lies"),
        ("{name: a, kind: utility, builtin: task}", "needs scorers"),
        (ATTACK + ", scorers: [maths]}", "the kind is attack"),
        ("{name: a, kind: harmless, builtin: harmless, gcg: {}}", "the kind is harmless"),
        (ATTACK + "}\n- " + ATTACK + "}", "same name: a"),
        ("{name: a, kind: attack, builtin: attack, count: 0}", "sections.0.count"),
        ("{name: a, kind: utility, harness: {tasks: [ifeval]}, count: 5}", "count: a harness asks"),
        ("{name: a, kind: utility, harness: {tasks: [ifeval]}, likelihood: true}", "likelihood: a harness"),
        ("{name: a, kind: utility, builtin: task, likelihood: true, probes: [base64]}", "probes are for"),
        ("{name: a, kind: utility, builtin: task, count: 1000000000000}", r"sections\.0\.count.* 1000000 "),
        (ATTACK + ", seed: -1}", r"sections\.0\.seed.*it is -1"),
        (ATTACK + f", seed: {10**30}}}", r"sections\.0\.seed"),
        ("{name: a, kind: attack, builtin: attack, second_attack: {epochs: .inf}}", "second_attack.epochs"),
        (ATTACK + ", probes: [prefill, base64, prefill]}", "a probe stands twice"),
        ("{name: a, kind: utility, harness: {tasks: [mmlu, mmlu]}}", "a task stands twice"),
        ('{name: a, kind: attack, file: "a\\0b"}', "zero byte"),
        ("&x {name: a, kind: attack, builtin: attack}\n- *x", "anchors"),
        ("[" * 100 + "]" * 100, "nested"),
    ],
)
def test_what_is_wrong_in_a_suite_is_named(tmp_path, sections, named):
    path = suite(tmp_path, sections)
    with pytest.raises(DeltaguardError, match=named) as caught:
        read_suite(path)
    assert "suite.yaml" in str(caught.value)


def test_more_examples_than_a_second_attack_has_are_told_before_anything_is_asked(tmp_path):
    path = suite(tmp_path, ATTACK + ", second_attack: {count: 4000}}")
    with pytest.raises(DeltaguardError, match="4000 harmful prompts were asked for and 303 are given"):
        resolve(read_suite(path))


def test_attacks_need_a_judge_and_a_suite_must_exist(tmp_path):
    with pytest.raises(DeltaguardError, match="no judges, and a need one"):
        read_suite(suite(tmp_path, ATTACK + "}", judges="[]"))
    with pytest.raises(DeltaguardError, match="judges"):
        read_suite(suite(tmp_path, ATTACK + "}", judges="[{kind: oracle}]"))
    with pytest.raises(DeltaguardError, match="quick, safety, utility, full"):
        read_suite("quikc")
    with pytest.raises(DeltaguardError, match=r"suite\.yaml cannot be used: .*\['just', 'a list'\]"):
        read_suite(suite_file(tmp_path, "- just\n- a list\n"))


def test_all_that_is_wrong_is_named_with_its_value(tmp_path):
    path = suite(tmp_path, ATTACK.replace("attack, builtin", "atack, builtin") + ", coutn: 3}", judges="[5]")
    with pytest.raises(DeltaguardError) as caught:
        read_suite(path)
    told = str(caught.value)
    assert told.startswith(f"{path} cannot be used:")
    assert "`judges.0`" in told
    assert "(it is 5)" in told
    assert "`sections.0.kind`: Input should be 'attack', 'harmless' or 'utility'" in told
    assert "Did you mean \"attack\"? (it is 'atack')" in told
    assert "`sections.0.coutn`" in told


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(DeltaguardError, match=r"suite\.yaml is not text in UTF-8"):
        read_suite(path)
    with pytest.raises(DeltaguardError, match="no regular file"):
        read_suite(tmp_path)


def test_everything_that_is_missing_is_named_before_any_model_runs(tmp_path):
    sections = (
        "{name: a, kind: harmless, file: nowhere.jsonl}\n"
        "- {name: b, kind: attack, builtin: attack, count: 100000}\n"
        "- {name: c, kind: attack, builtin: attack, probes: [pig-latin]}\n"
        "- {name: d, kind: utility, builtin: task, scorers: [vibes]}\n"
        "- {name: e, kind: attack, dataset: no-such-set}\n"
        "- {name: f, kind: utility, file: mine.jsonl, likelihood: true}\n"
        "- {name: g, kind: attack, builtin: attack}"
    )
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Why?"}\n')
    with pytest.raises(DeltaguardError) as caught:
        resolve(read_suite(suite(tmp_path, sections)))
    message = str(caught.value)
    assert "6 of 7 sections" in message
    for named in ("nowhere.jsonl", "100000", "pig-latin", "vibes", "no-such-set", "no expected answer"):
        assert named in message


@pytest.mark.parametrize(
    ("expected", "scorer", "named"),
    [
        (" ", "exact-match", "1 of 1 prompts have no expected answer"),
        ("?", "exact-match", "an empty answer is like the expected one '\\?'"),
        ("...", "rouge-l", r"'\.\.\.' holds no word"),
    ],
)
def test_an_expected_answer_that_says_nothing_is_refused(tmp_path, expected, scorer, named):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "Why?", "expected": expected}) + "\n")
    section = f"{{name: a, kind: utility, file: mine.jsonl, scorers: [{scorer}]}}"
    with pytest.raises(DeltaguardError, match=named):
        resolve(read_suite(suite(tmp_path, section)))


def test_no_package_is_asked_for_that_the_engine_has_no_use_for(tmp_path, monkeypatch):
    sections = "{name: a, kind: attack, builtin: attack, second_attack: {}, gcg: {}}\n"
    sections += "- {name: b, kind: utility, harness: {tasks: [mmlu]}}"
    asked = read_suite(suite(tmp_path, sections))
    without_packages(monkeypatch, "trl", "nanogcg", "lm_eval")
    with pytest.raises(DeltaguardError, match="2 of 2 sections"):
        resolve(asked)
    parts, notes = fit(resolve(asked, "openai")[0], "openai")
    assert [part.name for part in parts] == ["a"]
    assert len(notes) == 3


def test_an_optional_section_becomes_a_note(tmp_path):
    sections = ATTACK + "}\n- {name: b, kind: harmless, file: nowhere.jsonl, optional: true}"
    parts, (note,) = resolve(read_suite(suite(tmp_path, sections)))
    assert [part.name for part in parts] == ["a"]
    assert note.startswith("Section b was skipped: ")
    assert "nowhere.jsonl" in note
    with pytest.raises(DeltaguardError, match="No section"):
        resolve(read_suite(suite(tmp_path, sections.split("\n- ")[1])))


def test_a_users_file_is_found_beside_the_suite(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        '{"prompt": "2+2?", "expected": "4"}\n{"prompt": "3+3?", "expected": "6"}\n'
    )
    section = "{name: mine, kind: utility, file: mine.jsonl, scorers: [maths], likelihood: true}"
    ((part,), _) = resolve(read_suite(suite(tmp_path, section)))
    assert [question.expected for question in part.questions] == ["4", "6"]
    assert part.source == "the user's own file mine.jsonl"


def test_a_users_file_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.jsonl").write_text('{"prompt": "2+2?", "expected": "4"}\n')
    section = "{name: mine, kind: utility, file: ~/mine.jsonl, scorers: [maths]}"
    ((part,), _) = resolve(read_suite(suite(tmp_path, section)))
    assert len(part.questions) == 1


@pytest.mark.parametrize("scorer", ["maths", "json-match"])
def test_an_expected_answer_that_is_none_for_its_scorer_is_told_before_any_model_runs(scorer, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "2+2?", "expected": "four"}\n')
    section = f"{{name: mine, kind: utility, file: mine.jsonl, scorers: [{scorer}]}}"
    with pytest.raises(DeltaguardError, match="The expected answer 'four'"):
        resolve(read_suite(suite(tmp_path, section)))


def test_files_of_judges_are_found_beside_the_suite(tmp_path):
    judges = (
        "[{kind: guard, model: m, template: wildguard, prompt_file: format.txt},"
        " {kind: llm, base_url: u, model: m, cache: /elsewhere/scores.jsonl},"
        " {kind: llm, base_url: u, model: m, name: other}]"
    )
    guard, llm, other = read_suite(suite(tmp_path, ATTACK + "}", judges=judges)).judges
    assert guard.prompt_file == tmp_path / "format.txt"
    assert str(llm.cache) == "/elsewhere/scores.jsonl"
    assert other.cache is None


def test_what_an_engine_cannot_do_is_left_out_and_said(tmp_path):
    parts, _ = resolve(read_suite(suite_file(tmp_path, SMALL)))
    assert fit(parts, "transformers") == (parts, ())
    kept, notes = fit(parts, "vllm")
    assert [part.name for part in kept] == [part.name for part in parts]
    assert not any(part.likelihood for part in kept)
    assert len(notes) == 1
    kept, notes = fit(parts, "openai")
    assert [part.name for part in kept] == ["attack", "attack/base64", "harmless", "task"]
    assert len(notes) == 2
    general = "{name: e, kind: utility, builtin: general, likelihood: true}"
    only, _ = resolve(read_suite(suite(tmp_path, general)))
    with pytest.raises(DeltaguardError, match="can run no section"):
        fit(only, "openai")


def test_a_bound_on_perplexity_that_an_engine_cannot_measure_is_said(tmp_path):
    parts, _ = resolve(read_suite(suite(tmp_path, ATTACK + "}")))
    assert fit(parts, "transformers", max_perplexity=50)[1] == ()
    for engine in ("vllm", "openai"):
        (note,) = fit(parts, engine, max_perplexity=50)[1]
        assert note.startswith("max_perplexity 50 was left out: the " + engine)
    task = "{name: t, kind: utility, builtin: task, count: 2, scorers: [json-match]}"
    only, _ = resolve(read_suite(suite(tmp_path, task)))
    assert fit(only, "openai", max_perplexity=50)[1] == ()
