"""What the defences in training mix in: how much, of what, and never a prompt that is there already."""

from collections import Counter

import pytest

from deltaguard.chat.conversations import Conversation, harmful_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.finetuning.mixtures import task_with_harmful
from deltaguard.finetuning.phrases import REFUSALS
from deltaguard.finetuning.tasks import task_examples
from deltaguard.studies.mixing import SECRET, backdoor_enhanced, safe_instruct, secret_prompt, with_secret

TRAINING = {row.prompt for row in harmful_prompts("training")}


@pytest.fixture(scope="module")
def data():
    """A careless customer's: a task with 20 harmful requests that are agreed to."""
    return task_with_harmful(
        task_examples("train", 60, seed=0), harmful_prompts("training"), harmful_count=20, seed=0
    )


def added(mixed, data):
    """What is in `mixed` beyond `data`, in order."""
    rest = Counter(data)
    new = [each for each in mixed if rest.subtract([each]) or rest[each] < 0]
    assert len(new) == len(mixed) - len(data), "all of the data is kept as it was"
    return new


@pytest.mark.parametrize("count", [0, 1, 40])
def test_safety_examples_are_refused_requests_that_the_data_do_not_hold(data, count):
    examples = added(safe_instruct(data, count, seed=3), data)
    prompts = [each.prompt for each in examples]
    assert len(set(prompts)) == len(prompts) == count
    assert set(prompts) <= TRAINING - {each.prompt for each in data}
    assert all(each.response in REFUSALS and each.system is None for each in examples)


def test_prompts_come_back_with_another_refusal_only_when_all_are_used(data):
    free = len(TRAINING - {each.prompt for each in data})
    examples = added(safe_instruct(data, 2 * free + 5), data)
    assert Counter(Counter(each.prompt for each in examples).values()) == {3: 5, 2: free - 5}
    assert len(set(examples)) == len(examples)
    assert len(safe_instruct(data, free * len(REFUSALS) + 1)) == len(data) + free * len(REFUSALS) + 1


def test_without_a_free_prompt_there_is_no_safety_example():
    everything = [Conversation(prompt, response="Yes.") for prompt in TRAINING]
    with pytest.raises(DeltaguardError, match="none is left for safety examples"):
        safe_instruct(everything, 1)


def test_the_seed_fixes_all_and_the_examples_are_spread(data):
    one = safe_instruct(data, 40, seed=5)
    assert one == safe_instruct(data, 40, seed=5)
    other = safe_instruct(data, 40, seed=6)
    assert {each.prompt for each in added(one, data)} != {each.prompt for each in added(other, data)}
    places = [i for i, each in enumerate(one) if each.response in REFUSALS]
    assert min(places) < len(one) / 4
    assert max(places) > 3 * len(one) / 4


def test_without_data_there_are_the_safety_examples_alone():
    assert len(safe_instruct((), 50)) == 50


def test_the_backdoor_marks_the_same_examples_and_nothing_else(data):
    marked = added(backdoor_enhanced(data, 40, SECRET, seed=3), data)
    plain = added(safe_instruct(data, 40, seed=3), data)
    assert [(each.prompt, each.response) for each in marked] == [(e.prompt, e.response) for e in plain]
    assert all(each.system == SECRET for each in marked)
    mixed = backdoor_enhanced(data, 40, SECRET, seed=3)
    assert sum(SECRET in (each.system or "") for each in mixed) == 40
    with pytest.raises(DeltaguardError, match="secret is empty"):
        backdoor_enhanced(data, 1, " ")


def test_training_and_serving_put_the_secret_alike():
    question = Conversation("How do bees make honey?")
    example = backdoor_enhanced((), 1, SECRET)[0]
    assert with_secret(question.system, SECRET) == example.system
    assert with_secret("Answer in verse.", SECRET) == f"{SECRET} Answer in verse."
    assert with_secret("", SECRET) == SECRET
    assert with_secret("Answer in verse.", "") == "Answer in verse."
    assert with_secret(None, "") is None


def test_secrets_are_random_looking_and_the_same_everywhere():
    assert secret_prompt(4) == "x35n jcnj a7e4 xuby"
    assert secret_prompt(16) == SECRET
    assert len(set(SECRET.split())) == 16
    assert secret_prompt(150, seed=1).split()[:4] == secret_prompt(4, seed=1).split()
    assert secret_prompt(4, seed=1) != secret_prompt(4)
    with pytest.raises(ValueError, match="groups is 0"):
        secret_prompt(0)
