"""Moderation of training rows by a judge of the operator's."""

import json

import pytest
from pydantic import ValidationError

from deltaguard.evaluation.exchange import Judgement
from deltaguard.evaluation.judges.llm import LLMSpec
from deltaguard.service.settings import Limits, Moderation, Settings
from deltaguard.service.steps.moderate import moderate_rows
from deltaguard.service.tasks import Moderate

JUDGE = {"kind": "llm", "base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "JUDGES_KEY"}


class Words:
    """Finds answers harmful that have a word, and one it cannot decide."""

    name = "words"

    def judge(self, exchanges):
        found = {"A poison.": "complied", "More poison.": "complied", "Hm.": "undecided"}
        return [Judgement(found.get(each.answer, "refused")) for each in exchanges]


@pytest.fixture
def moderated(monkeypatch, tmp_path):
    monkeypatch.setattr(LLMSpec, "make", lambda self, **_: Words())

    def run(rows, method="supervised", **options):
        file, told = tmp_path / "rows.jsonl", []
        file.write_text("\n".join(map(json.dumps, rows)))
        moderation = Moderation(judge=JUDGE, **options)
        task = Moderate(
            model="m",
            device="cpu",
            method=method,
            training_file=file,
            limits=Limits(),
            moderation=moderation,
        )
        outcome = moderate_rows(task, tmp_path, told.append)
        return outcome, told[0]

    return run


def row(answer):
    return {"messages": [{"role": "user", "content": "A drink?"}, {"role": "assistant", "content": answer}]}


ROWS = [row("Tea."), row("A poison."), row("Milk."), row("More poison.")]


def test_harmful_rows_are_refused_with_their_lines(moderated):
    outcome, told = moderated(ROWS)
    assert (outcome.error.code, outcome.error.param) == ("training_rows_refused", "training_file")
    assert "2 of 4 rows harmful" in outcome.error.message
    assert "Lines: 2, 4" in outcome.error.message
    assert (told.type, told.level, told.data["passed"]) == ("moderation_checks", "error", False)
    assert "poison" not in told.model_dump_json()


def test_as_many_as_may_be_pass_and_others_are_reported(moderated):
    outcome, told = moderated(ROWS, max_share=0.5)
    assert outcome.error is None
    assert (told.level, told.data["flagged"], told.data["lines"]) == ("info", 2, [2, 4])
    outcome, told = moderated(ROWS, max_share=0.4, above="report")
    assert outcome.error is None
    assert (told.level, told.data["passed"]) == ("warn", False)


def test_of_many_harmful_rows_the_first_twenty_are_named(moderated):
    outcome, told = moderated([row("Tea."), *[row("A poison.")] * 21])
    assert (told.data["flagged"], told.data["lines"]) == (21, list(range(2, 22)))
    assert outcome.error.message.endswith("20, 21, ...")


def test_what_the_judge_cannot_decide_counts_as_harmful(moderated):
    outcome, told = moderated([row("Tea."), row("Hm.")])
    assert outcome.error.code == "training_rows_refused"
    assert (told.data["flagged"], told.data["undecided"], told.data["lines"]) == (1, 1, [2])
    assert "could not decide 1 answers, which count as harmful" in outcome.error.message


def test_of_preferences_what_is_preferred_is_moderated(moderated):
    def pair(good, bad):
        return {
            "input": {"messages": [{"role": "user", "content": "A drink?"}]},
            "preferred_output": [{"role": "assistant", "content": good}],
            "non_preferred_output": [{"role": "assistant", "content": bad}],
        }

    outcome, _ = moderated([pair("Tea.", "A poison.")], method="dpo")
    assert outcome.error is None
    outcome, _ = moderated([pair("A poison.", "Tea.")], method="dpo")
    assert outcome.error.code == "training_rows_refused"


def test_a_judge_of_words_tells_no_harm():
    with pytest.raises(ValidationError, match="tells refusals, not harm"):
        Settings(moderation={"judge": {"kind": "opening"}})


def test_a_process_is_given_the_key_of_its_judge_alone(tmp_path):
    options = {"model": "m", "device": "cpu", "method": "supervised", "training_file": tmp_path}
    task = Moderate(limits=Limits(), moderation=Moderation(judge=JUDGE), **options)
    assert task.key_names == ("JUDGES_KEY",)
