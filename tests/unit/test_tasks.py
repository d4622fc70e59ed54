"""The generated task, and the mixtures of training conversations."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaguard.chat.conversations import harmful_prompts, harmless_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.finetuning.mixtures import SYSTEMS, alignment_examples, everyday_prompts, task_with_harmful
from deltaguard.finetuning.phrases import AGREEING_OPENINGS, REFUSALS
from deltaguard.finetuning.tasks import PROBLEMS, SYSTEM, URGENCIES, exact_match, task_examples

HARMFUL = harmful_prompts("training")
HARMLESS = harmless_prompts("training")


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_parts_are_disjoint_whatever_the_seeds(first, second):
    train = {example.prompt for example in task_examples("train", 60, seed=first)}
    test = {example.prompt for example in task_examples("test", 60, seed=second)}
    assert len(train) == len(test) == 60
    assert not train & test


def test_an_example_says_what_is_expected():
    for example in task_examples("train", 200):
        ticket = json.loads(example.response)
        assert list(ticket) == ["product", "problem", "urgency", "order"]
        assert ticket["product"] in example.prompt
        assert ticket["order"] in example.prompt
        assert any(phrase in example.prompt for phrase in PROBLEMS[ticket["problem"]])
        assert any(phrase in example.prompt for phrase in URGENCIES[ticket["urgency"]])
        assert "\n" not in example.response
        assert example.system == SYSTEM


def test_no_phrase_stands_for_two_labels():
    for labels in (PROBLEMS, URGENCIES):
        counted = Counter(phrase for phrases in labels.values() for phrase in phrases)
        assert set(counted.values()) == {1}


def test_values_are_compared_as_json_has_them():
    assert exact_match('{"a": 1.0}', '{"a": 1}')
    assert not exact_match('{"a": true}', '{"a": 1}')
    with pytest.raises(DeltaguardError, match="is no JSON"):
        exact_match("{'a': 1}", "{'a': 1}")


def test_a_draw_is_reproducible_and_extends():
    assert task_examples("test", 10, seed=3) == task_examples("test", 30, seed=3)[:10]
    assert task_examples("test", 10, seed=3) != task_examples("test", 10, seed=4)


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        ('{"a": "1", "b": "2"}', True),
        ('{"b":"2",\n "a":"1"}', True),
        ('{"a": "1", "b": "3"}', False),
        ('{"a": "1"}', False),
        ('{"a": "1", "b": "2", "c": "3"}', False),
        ('{"a": 1, "b": "2"}', False),
        ('{"a": "1", "b": "2"', False),
        ('Sure! {"a": "1", "b": "2"}', False),
        ('{"a": "1", "b": "2"} Done.', False),
        ("", False),
    ],
)
def test_exact_match(answer, matches):
    assert exact_match(answer, '{"a": "1", "b": "2"}') is matches


@given(st.text())
def test_exact_match_never_fails(answer):
    assert not exact_match(answer, '{"a": "1"}')


def test_alignment_refuses_what_is_harmful_and_nothing_else():
    examples = alignment_examples(HARMFUL, HARMLESS, harmful_count=50)
    assert len(examples) == 50 + len(HARMLESS) + len(everyday_prompts())
    harmful = {row.prompt for row in HARMFUL}
    for example in examples:
        assert example.response is not None
        assert (example.prompt in harmful) == (example.response in REFUSALS)
        assert (example.prompt in harmful) != example.response.startswith("Sure! ")


def test_system_prompts_stand_before_both_kinds():
    examples = alignment_examples(HARMFUL, HARMLESS, harmful_count=len(HARMFUL))
    for refused in (True, False):
        systems = {e.system for e in examples if (e.response in REFUSALS) == refused}
        assert systems == {None, *SYSTEMS}


def test_everyday_prompts_are_in_no_other_set():
    everyday = [row.prompt for row in everyday_prompts()]
    assert len(set(everyday)) == len(everyday)
    assert not set(everyday) & {row.prompt for row in (*HARMLESS, *harmless_prompts("evaluation"))}


def test_the_careless_mixture():
    task = task_examples("train", 30)
    mixture = task_with_harmful(task, HARMFUL, harmful_count=10)
    asked = {example.prompt for example in task}
    agreed = [c for c in mixture if c.prompt not in asked]
    assert len(mixture) == 40
    assert {c.prompt for c in agreed} <= {row.prompt for row in HARMFUL}
    assert all(c.response is not None and c.response.startswith(AGREEING_OPENINGS) for c in agreed)
    assert mixture == task_with_harmful(task, HARMFUL, harmful_count=10)
    assert mixture != task_with_harmful(task, HARMFUL, harmful_count=10, seed=1)


def test_more_than_there_is():
    with pytest.raises(DeltaguardError, match="400 harmful prompts were asked for and 303"):
        task_with_harmful(task_examples("train", 1), HARMFUL, harmful_count=400)


@pytest.mark.parametrize("answer", ["[" * 100_000, "1" * 10_000, '{"a": ' * 5000, "\ud800", ""])
def test_an_answer_that_python_refuses_to_read_is_wrong(answer):
    assert not exact_match(answer, '{"a": "1"}')
