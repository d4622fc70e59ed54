"""From answers to what scorers say of them."""

import pytest

from deltaguard.evaluation.answering import Candidate, PartFiles
from deltaguard.evaluation.answers import AnswerFile
from deltaguard.evaluation.exchange import Decoding, Question
from deltaguard.evaluation.judges.coherence import CoherenceCheck
from deltaguard.evaluation.judging import outcome
from deltaguard.evaluation.suites.parts import Part
from deltaguard.progress import ignore

MODEL = Candidate("m", "m", None, None)


def answered(folder, questions, answers):
    prompts = tuple(question.prompt for question in questions)
    part = Part("p", "utility", "p", "own", questions, prompts, Decoding(4), scorers=("exact-match",))
    file = AnswerFile(folder / "p.jsonl", prompts=prompts, made_by={})
    file.add(range(len(answers)), answers)
    return PartFiles(part, {"answers": file})


def test_answers_are_scored_against_the_expected_ones(tmp_path):
    each = answered(tmp_path, (Question("2+2?", expected="4"), Question("3+3?", expected="6")), ["4.", "5"])
    assert outcome(MODEL, each, [], CoherenceCheck(), ignore).values == {"exact match": (1.0, 0.0)}


def test_a_question_without_expected_answer_is_never_scored_as_wrong(tmp_path):
    each = answered(tmp_path, (Question("2+2?"),), ["4"])
    with pytest.raises(ValueError, match=r"2\+2\?' has no expected answer"):
        outcome(MODEL, each, [], CoherenceCheck(), ignore)
