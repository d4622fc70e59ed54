"""From verdicts to numbers: counted by hand, and what the tables may say of them."""

import io

import pytest
from rich.console import Console

from deltaguard.draw.evaluation import comparison_line, evaluation_card, evaluation_table
from deltaguard.draw.text import plain
from deltaguard.evaluation.answering import Candidate, model_names
from deltaguard.evaluation.evaluate import EngineConfig, assemble
from deltaguard.evaluation.harness_numbers import harness_measures
from deltaguard.evaluation.outcomes import Judged, Outcome, agreements, comparisons, measures, samples
from deltaguard.evaluation.suites.suite import read_suite
from deltaguard.report.evaluation import SectionRow


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


def judged(letters, scores=None):
    names = {"c": "complied", "r": "refused", "i": "incoherent", "u": "undecided"}
    classes = tuple(names[letter] for letter in letters)
    verdicts = tuple("complied" if each == "incoherent" else each for each in classes)
    return Judged(verdicts, classes, scores or (None,) * len(letters))


def outcome(model, by_judge, kind="attack", values=None):
    size = len(next(iter(by_judge.values())).classes) if by_judge else len(next(iter(values.values())))
    name = {"attack": "attack", "harmless": "harmless", "utility": "task"}[kind]
    prompts = tuple(f"prompt {i}" for i in range(size))
    answers = tuple(f"{model} {i}" for i in range(size))
    return Outcome(model, section(name, kind, size), prompts, answers, by_judge, values or {}, {})


def found(rows):
    return {(each.model, each.name, each.judge): each.estimate for each in measures(rows)}


def test_classes_are_counted_over_all_prompts():
    numbers = found([outcome("m", {"j": judged("ccriu")})])
    assert numbers["m", "attack success", "j"].value == pytest.approx(0.4)
    assert numbers["m", "incoherent", "j"].value == pytest.approx(0.2)
    assert numbers["m", "undecided", "j"].value == pytest.approx(0.2)
    assert all(each.total == 5 and each.interval == "wilson" for each in numbers.values())
    assert ("m", "undecided", "j") not in found([outcome("m", {"j": judged("cc")})])
    harmless = found([outcome("m", {"j": judged("rrci")}, "harmless")])
    assert harmless["m", "false refusal", "j"].value == 0.5


def test_scores_are_averaged_over_those_there_are():
    numbers = found([outcome("m", {"llm": judged("curc", (5.0, None, 1.0, 3.0))})])
    assert numbers["m", "harmfulness", "llm"].value == 3
    assert numbers["m", "harmfulness", "llm"].total == 3


def test_shares_and_means_have_the_intervals_that_suit_them():
    values = {
        "exact match": (1.0, 0.0, 1.0, 1.0),
        "rouge-l": (0.0, 0.0, 1.0, 0.0),
        "nll": (1.0, 0.0, 1.0, 1.0),
    }
    rows = measures([outcome("m", {}, "utility", values)])
    assert [(each.name, each.better, each.estimate.interval) for each in rows] == [
        ("exact match", "higher", "wilson"),
        ("rouge-l", "higher", "bootstrap"),
        ("nll", "lower", "bootstrap"),
    ]


def test_comparisons_are_paired_and_claim_no_more_than_the_interval():
    many = 40
    rows = [
        outcome("aligned", {"j": judged("r" * many)}),
        outcome("tuned", {"j": judged("c" * many)}),
        outcome("close", {"j": judged("c" + "r" * (many - 1))}),
    ]
    said = {(each.model, each.name): each for each in comparisons(rows)}
    assert said["tuned", "attack success"].finding == "higher"
    assert said["tuned", "attack success"].difference == 1
    assert said["close", "attack success"].finding == "not told apart"
    assert said["close", "attack success"].p_value == 1
    assert "higher than aligned, +100.0 points" in comparison_line(said["tuned", "attack success"])
    assert "not told apart from aligned" in comparison_line(said["close", "attack success"])
    assert ("tuned", "undecided") not in said


def test_what_only_one_model_has_is_compared_too():
    rows = [outcome("a", {"j": judged("rrr")}), outcome("b", {"j": judged("uur")})]
    said = {each.name: each.difference for each in comparisons(rows)}
    assert said["undecided"] == pytest.approx(2 / 3)


def test_scores_that_are_missing_are_left_out_of_the_pairs():
    one = outcome("a", {"llm": judged("ccuc", (5.0, 4.0, None, 4.0))})
    other = outcome("b", {"llm": judged("rruc", (1.0, 1.0, 1.0, None))})
    (said,) = [each for each in comparisons([one, other]) if each.name == "harmfulness"]
    assert said.difference == -3.5


def test_kappa_is_over_the_answers_of_all_models():
    rows = [
        outcome("a", {"one": judged("crcr"), "two": judged("crrc"), "three": judged("cccc")}),
        outcome("b", {"one": judged("crcu"), "two": judged("crcr"), "three": judged("cccc")}),
    ]
    first = agreements(rows)[0]
    assert (first.first, first.second, first.agreed, first.total) == ("one", "two", 5, 7)
    # Both say `complied` 4 of 7 times: by chance (4·4 + 3·3) / 49.
    assert first.kappa == pytest.approx((5 / 7 - 25 / 49) / (1 - 25 / 49))
    assert len(agreements(rows)) == 3


def test_samples_are_the_first_prompts_with_all_models_side_by_side():
    rows = [outcome(name, {"j": judged("cri")}) for name in ("a", "b")]
    first, second = samples(rows, 2)
    assert first.prompt == "prompt 0"
    assert first.answers == {"a": "a 0", "b": "b 0"}
    assert second.verdicts == {"a": {"j": "refused"}, "b": {"j": "refused"}}


def test_only_shares_of_the_harness_become_measures():
    task = {"task": "mmlu", "metric": "acc", "samples": 8, "higher_is_better": True}
    shares = harness_measures(
        {"mmlu": [{**task, "value": 0.25}, {**task, "metric": "perplexity", "value": 12.5}]}
    )
    assert list(shares) == ["mmlu acc"]
    estimate, better = shares["mmlu acc"]
    assert (estimate.value, estimate.total, better) == (0.25, 8, "higher")
    assert harness_measures({"mmlu": [{**task, "value": 0.3}]}) == {}


def test_names_of_models_differ_and_serve_as_folders():
    names = model_names(["a/b", "c/b/", "b", "org/b@main", "..", "x y"])
    assert names == ["b", "b-2", "b-3", "b-4", "model", "x-y"]
    assert model_names(["b-2", "b", "a/b"]) == ["b-2", "b", "b-3"]


def test_tables_fit_80_columns_and_markup_in_names_is_text():
    rows = [
        outcome(name, {"opening": judged("crciu"), "keywords": judged("ccrrr")})
        for name in ("aligned", "tuned")
    ]
    report = assemble(
        read_suite("quick"),
        (),
        [Candidate(name, f"folder/{name}", None, None) for name in ("aligned", "tuned")],
        rows,
        config=EngineConfig(device="cpu"),
        notes=["Section x was skipped: no file."],
        files={},
        seconds={},
    ).model_copy(update={"sections": (rows[0].section,)})
    console = Console(width=80, file=io.StringIO())
    console.print(evaluation_table(report))
    drawn = console.file.getvalue()
    assert "Section x was skipped" in drawn
    assert "…" not in drawn
    assert "kappa" in drawn
    card = evaluation_card(report)
    assert "<b>" not in card
    assert "40.0 % (11.8–76.9 %)" in card
    assert "- tuned: attack success (opening) not told apart from aligned" in card
    assert not [line for line in card.splitlines() if line.startswith("|") and not line.endswith("|")]
    assert plain("a|b") == "a¦b"
