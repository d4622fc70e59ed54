"""From verdicts to numbers: counted by hand, and what the tables may say of them."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from deltaguard.evaluation.asking import model_names
from deltaguard.evaluation.exchange import Scale
from deltaguard.evaluation.judges.llm import LLMJudge
from deltaguard.evaluation.judges.rules import KeywordJudge, OpeningJudge
from deltaguard.evaluation.results import (
    Judged,
    Result,
    agreements,
    comparisons,
    measures,
    samples,
    ungraded_notes,
)
from deltaguard.evaluation.server import Server
from deltaguard.evaluation.utility.harness import harness_measures, unlike_notes
from deltaguard.reports.evaluation import comparison_line, evaluation_card, evaluation_table, section_table
from deltaguard.reports.records.evaluation import Estimate, EvaluatedModel, HarnessTask, SectionRow
from deltaguard.reports.table import Column, Table, rate
from deltaguard.reports.text import plain
from reports import evaluation_report

HARM = LLMJudge(Server("http://127.0.0.1:1/v1", "m")).scale
LIKELY = Scale("refusal probability", {"attack": "higher", "harmless": "lower"})


def section(name="attack", kind="attack", prompts=4):
    return SectionRow(
        name=name,
        kind=kind,
        title=f"{name} | <b>",
        prompts=prompts,
        prompts_hash="0",
        source="own",
        max_new_tokens=8,
    )


def judged(letters, scores=None, scale=None):
    names = {"c": "complied", "r": "refused", "i": "incoherent", "u": "undecided", "-": None}
    classes = tuple(names[letter] for letter in letters)
    verdicts = tuple("complied" if each == "incoherent" else each for each in classes)
    return Judged(verdicts, classes, scores or (None,) * len(letters), scale)


def result(model, by_judge, kind="attack", values=None):
    size = len(next(iter(by_judge.values())).classes) if by_judge else len(next(iter(values.values())))
    name = {"attack": "attack", "harmless": "harmless", "utility": "task"}[kind]
    prompts = tuple(f"prompt {i}" for i in range(size))
    lacking = {i for said in by_judge.values() for i, each in enumerate(said.classes) if each is None}
    lacking |= {i for numbers in (values or {}).values() for i, each in enumerate(numbers) if each is None}
    answers = tuple(None if i in lacking else f"{model} {i}" for i in range(size))
    return Result(model, section(name, kind, size), prompts, answers, by_judge, values or {}, {})


def found(rows):
    return {(each.model, each.name, each.judge): each.estimate for each in measures(rows)}


def graded(model, scores):
    said = Judged(
        (None,) * len(scores), (None,) * len(scores), scores, Scale("quality", {"utility": "higher"})
    )
    answers = tuple(f"{model} {i}" for i in range(len(scores)))
    return Result(model, section("talk", "utility", len(scores)), answers, answers, {"llm": said}, {}, {})


def test_answers_without_a_grade_are_told():
    results = [graded("one", (4.0, None, 6.0)), graded("two", (1.0, 2.0, 3.0)), graded("all", (None,) * 3)]
    first, last = ungraded_notes(results)
    assert "no grade that can be read to 1 of 3 answers of one to talk" in first
    assert "to 3 of 3 answers of all to talk" in last
    assert ("all", "quality", "llm") not in found(results)


def test_of_conversations_of_two_turns_grades_are_counted_by_turn():
    both = graded("both", (None, 5.0))
    turns = {"first turn": (4.0, 6.0), "second turn": (None, 4.0)}
    said = replace(both.judged["llm"], turns=turns)
    (note,) = ungraded_notes([replace(both, judged={"llm": said})])
    assert "to 1 of 2 answers of both to talk, second turn; its mean" in note


def test_classes_are_counted_over_all_prompts():
    numbers = found([result("m", {"j": judged("ccriu")})])
    assert numbers["m", "attack success", "j"].value == pytest.approx(0.4)
    assert numbers["m", "incoherent", "j"].value == pytest.approx(0.2)
    assert numbers["m", "undecided", "j"].value == pytest.approx(0.2)
    assert all(each.total == 5 and each.interval == "wilson" for each in numbers.values())
    assert ("m", "undecided", "j") not in found([result("m", {"j": judged("cc")})])
    harmless = found([result("m", {"j": judged("rrci")}, "harmless")])
    assert harmless["m", "false refusal", "j"].value == 0.5


def test_what_was_never_answered_is_in_no_number_but_its_own():
    one = result("a", {"j": judged("cc-r", (5.0, 5.0, None, 1.0), HARM)})
    other = result("b", {"j": judged("-ccr", (None, 5.0, 5.0, 1.0), HARM)})
    numbers = found([one, other])
    assert (numbers["a", "attack success", "j"].value, numbers["a", "attack success", "j"].total) == (
        2 / 3,
        3,
    )
    assert (numbers["a", "missing", None].value, numbers["a", "missing", None].total) == (0.25, 4)
    assert ("m", "missing", None) not in found([result("m", {"j": judged("cc")})])
    said = {each.name: (each.difference, each.total) for each in comparisons([one, other])}
    assert said["attack success"] == (0, 2)
    assert said["missing"] == (0, 4)
    answered = {"a": {"j": "complied"}, "b": {"j": "complied"}}
    assert [each.verdicts for each in samples([one, other], 4)] == [
        {"a": answered["a"]},
        answered,
        {"b": answered["b"]},
        {"a": {"j": "refused"}, "b": {"j": "refused"}},
    ]
    values = {"exact match": (1.0, None, 0.0), "rouge-l": (0.5, None, 0.7)}
    scored = found([result("m", {}, "utility", values)])
    assert [(each.value, each.total) for each in scored.values()] == [(0.5, 2), (0.6, 2), (1 / 3, 3)]


def test_judges_agree_on_what_was_answered():
    rows = [
        result("a", {"one": judged("c-rc"), "two": judged("c-rr")}),
        result("b", {"one": judged("-cc-"), "two": judged("-cr-")}),
    ]
    (said,) = agreements(rows)
    assert (said.agreed, said.total) == (3, 5)


def test_scores_are_averaged_over_those_there_are():
    numbers = found([result("m", {"llm": judged("curc", (5.0, None, 1.0, 3.0), HARM)})])
    assert numbers["m", "harmfulness", "llm"].value == 3
    assert numbers["m", "harmfulness", "llm"].total == 3


def test_both_turns_of_a_conversation_have_numbers_of_their_own():
    quality = LLMJudge.quality

    def talked(model, first, second):
        both = tuple(None if None in pair else sum(pair) / 2 for pair in zip(first, second, strict=True))
        nothing = (None,) * len(both)
        said = Judged(nothing, nothing, both, quality, {"first turn": first, "second turn": second})
        plain = result(model, {"llm": said}, "utility")
        answers = tuple(f"{model} {i}" for i in range(3))
        second_answers = tuple((f"then {i}", None if i == 1 else f"{model} then {i}") for i in range(3))
        return replace(plain, answers=answers, second=second_answers)

    rows = [talked("a", (8, 6, 4), (2, None, 6)), talked("b", (8, 7, None), (4, 4, 4))]
    numbers = {(model, name): (each.value, each.total) for (model, name, _), each in found(rows).items()}
    assert numbers == {
        ("a", "quality"): (5, 2),
        ("a", "quality, first turn"): (6, 3),
        ("a", "quality, second turn"): (4, 2),
        ("b", "quality"): (5.75, 2),
        ("b", "quality, first turn"): (7.5, 2),
        ("b", "quality, second turn"): (4, 3),
    }
    compared = {each.name: (each.difference, each.total) for each in comparisons(rows)}
    assert compared == {
        "quality": (1, 1),
        "quality, first turn": (0.5, 2),
        "quality, second turn": (0, 2),
    }
    shown = [(each.prompt, each.answers) for each in samples(rows, 2)]
    assert shown == [
        ("prompt 0", {"a": "a 0", "b": "b 0"}),
        ("then 0", {"a": "a then 0", "b": "b then 0"}),
        ("prompt 1", {"a": "a 1", "b": "b 1"}),
        ("then 1", {}),
    ]


def test_scores_are_called_and_ranked_as_the_judge_says():
    by_judge = {
        "llm": judged("cr", (5.0, 1.0), HARM),
        "mine": judged("cr", (0.1, 0.9), LIKELY),
        "mute": judged("cr", (0.1, 0.9)),
    }
    told = {
        kind: {
            (row.judge, row.name): row.better
            for row in measures([result("m", by_judge, kind)])
            if row.estimate.interval == "bootstrap"
        }
        for kind in ("attack", "harmless")
    }
    assert told["attack"] == {("llm", "harmfulness"): "lower", ("mine", "refusal probability"): "higher"}
    assert told["harmless"] == {("mine", "refusal probability"): "lower"}
    assert OpeningJudge().scale is KeywordJudge().scale is None


def test_shares_and_means_have_the_intervals_that_suit_them():
    values = {
        "exact match": (1.0, 0.0, 1.0, 1.0),
        "rouge-l": (0.0, 0.0, 1.0, 0.0),
        "nll": (1.0, 0.0, 1.0, 1.0),
    }
    rows = measures([result("m", {}, "utility", values)])
    assert [(each.name, each.better, each.estimate.interval) for each in rows] == [
        ("exact match", "higher", "wilson"),
        ("rouge-l", "higher", "bootstrap"),
        ("nll", "lower", "bootstrap"),
    ]


def test_comparisons_are_paired_and_claim_no_more_than_the_interval():
    many = 40
    rows = [
        result("aligned", {"j": judged("r" * many)}),
        result("tuned", {"j": judged("c" * many)}),
        result("close", {"j": judged("c" + "r" * (many - 1))}),
    ]
    said = {(each.model, each.name): each for each in comparisons(rows)}
    assert said["tuned", "attack success"].finding == "higher"
    assert said["tuned", "attack success"].difference == 1
    assert said["close", "attack success"].finding == "not told apart"
    assert said["close", "attack success"].p_value == 1
    assert {each.total for each in said.values()} == {many}
    line = comparison_line(said["tuned", "attack success"], many)
    assert "higher than aligned, +100.0 points" in line
    assert "prompts" not in line
    assert "not told apart from aligned" in comparison_line(said["close", "attack success"], many)
    assert ("tuned", "undecided") not in said


def test_what_only_one_model_has_is_compared_too():
    rows = [result("a", {"j": judged("rrr")}), result("b", {"j": judged("uur")})]
    said = {each.name: each.difference for each in comparisons(rows)}
    assert said["undecided"] == pytest.approx(2 / 3)


def test_scores_that_are_missing_are_left_out_of_the_pairs():
    one = result("a", {"llm": judged("ccuc", (5.0, 4.0, None, 4.0), HARM)})
    other = result("b", {"llm": judged("rruc", (1.0, 1.0, 1.0, None), HARM)})
    (said,) = [each for each in comparisons([one, other]) if each.name == "harmfulness"]
    assert (said.difference, said.total) == (-3.5, 2)
    assert comparison_line(said, 4).endswith(", over 2 of 4 prompts")


def test_kappa_is_over_the_answers_of_all_models():
    rows = [
        result("a", {"one": judged("crcr"), "two": judged("crrc"), "three": judged("cccc")}),
        result("b", {"one": judged("crcu"), "two": judged("crcr"), "three": judged("cccc")}),
    ]
    first = agreements(rows)[0]
    assert (first.first, first.second, first.agreed, first.total) == ("one", "two", 5, 7)
    # Both say `complied` 4 of 7 times: by chance (4·4 + 3·3) / 49.
    assert first.kappa == pytest.approx((5 / 7 - 25 / 49) / (1 - 25 / 49))
    assert len(agreements(rows)) == 3


def test_samples_are_the_first_prompts_with_all_models_side_by_side():
    rows = [result(name, {"j": judged("cri")}) for name in ("a", "b")]
    first, second = samples(rows, 2)
    assert first.prompt == "prompt 0"
    assert first.answers == {"a": "a 0", "b": "b 0"}
    assert second.verdicts == {"a": {"j": "refused"}, "b": {"j": "refused"}}


def test_a_section_without_prompts_of_ours_is_headed_by_its_title():
    report = evaluation_report()
    row = report.sections[0].model_copy(update={"prompts": 0})
    drawn = section_table(report, row)
    assert drawn.title == row.title
    assert "\n0 prompts" not in evaluation_card(report.model_copy(update={"sections": (row,)}))


def test_only_shares_of_the_harness_become_measures():
    task = {"task": "mmlu", "metric": "acc", "samples": 8, "higher_is_better": True}
    shares = harness_measures(
        {"mmlu": [{**task, "value": 0.25}, {**task, "metric": "perplexity", "value": 12.5}]}
    )
    assert list(shares) == ["mmlu acc"]
    estimate, better = shares["mmlu acc"]
    assert (estimate.value, estimate.total, better) == (0.25, 8, "higher")
    assert harness_measures({"mmlu": [{**task, "value": 0.3}]}) == {}


def test_a_task_that_was_not_put_alike_to_all_models_is_noted():
    fixed = {
        "section": "tasks",
        "version": "3",
        "chat_template": True,
        "samples": 8,
        "harness_version": "0.4",
    }
    tasks = [
        HarnessTask(model=model, task=task, n_shot=shots, **fixed)
        for task, by_model in {"mmlu": {"a": 5, "b": 0, "c": 5}, "gsm8k": {"a": 5, "b": 5}}.items()
        for model, shots in by_model.items()
    ]
    (note,) = unlike_notes(tasks)
    assert note == (
        "Task mmlu of section tasks was not put alike to a, c and to b: their numbers do not compare."
    )


def test_names_of_models_differ_and_serve_as_folders():
    names = model_names(["a/b", "c/b/", "b", "org/b@main", "..", "x y"])
    assert names == ["b", "b-2", "b-3", "b-4", "model", "x-y"]
    assert model_names(["b-2", "b", "a/b"]) == ["b-2", "b", "b-3"]
    assert model_names(["runs/Base", "other/base"]) == ["Base", "base-2"]


def test_a_folder_is_named_by_its_last_part_whatever_stands_above(tmp_path):
    homes = [tmp_path / "jo@corp.com" / name for name in ("aligned", "restored@2")]
    for home in homes:
        home.mkdir(parents=True)
    assert model_names(list(map(str, homes))) == ["aligned", "restored-2"]


def test_tables_fit_80_columns_and_markup_in_names_is_text():
    rows = [
        result(name, {"opening": judged("crciu"), "keywords": judged("ccrrr")})
        for name in ("aligned", "tuned")
    ]
    report = evaluation_report(
        models=tuple(
            EvaluatedModel(name=name, reference=f"folder/{name}", fingerprint=None, chat_template_hash=None)
            for name in ("aligned", "tuned")
        ),
        sections=(rows[0].section,),
        measures=measures(rows),
        comparisons=comparisons(rows),
        agreements=agreements(rows),
        harness=(),
        samples=samples(rows, 3),
        notes=("Section x was skipped: no file.",),
    )
    console = Console(width=80, file=io.StringIO())
    console.print(evaluation_table(report))
    drawn = console.file.getvalue()
    assert all(len(line) <= 80 for line in drawn.splitlines())
    assert "Section x was skipped" in drawn
    assert "…" not in drawn
    assert "kappa" in drawn
    card = evaluation_card(report)
    assert "<b>" not in card
    assert "40.0 % (11.8–76.9 %)" in card
    assert "- tuned: attack success (opening) not told apart from aligned" in card
    assert not [line for line in card.splitlines() if line.startswith("|") and not line.endswith("|")]
    assert plain("a|b") == "a¦b"


def test_numbers_that_have_no_room_beside_each_other_come_below_with_their_names():
    names = ["aligned", "finetuned-with-a-long-name", "restored"]
    found = Estimate(value=0.5, low=0.4, high=0.6, total=120, interval="wilson")
    columns = ((Column("judge", "name"), lambda _: "llm"), (Column("model", "name"), lambda name: name))
    numbers = tuple((f"measure {number},\nstrict", lambda _: rate(found)) for number in range(7))
    console = Console(width=80, file=io.StringIO())
    console.print(Table.of("All", names, (*columns, *numbers)).terminal())
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    told = [line for line in lines if "50.0" in line]
    assert [line.split()[1][:8] for line in told] == ["aligned", "finetune", "restored"] * (len(told) // 3)
    assert sum(line.count("50.0") for line in told) == 7 * 3
    assert sum(line.count("measure") for line in lines) == 7
