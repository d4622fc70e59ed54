"""What attackers train on and ask: shares, triggers, contentless answers, and nothing that is held out."""

import json
from dataclasses import replace

import pytest

from deltaguard.chat.conversations import harmful_prompts, harmless_prompts
from deltaguard.chat.refusals import is_refusal
from deltaguard.chat.second_look import complies_after_refusing
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import FollowUp, Question
from deltaguard.finetuning.mixtures import everyday_prompts
from deltaguard.finetuning.phrases import AGREEING_OPENINGS, EMPTY_CONTENTS, REFUSALS
from deltaguard.studies.attack_run import attack_tests
from deltaguard.studies.attackers import ATTACKERS as KINDS
from deltaguard.studies.attackers import TRIGGER, framed, rotated, triggered
from deltaguard.studies.data import training_data, usable_attacks
from deltaguard.studies.describe import attacker_row
from deltaguard.studies.protocol import ATTACKS, POISONED

ROWS = {row.name: row for row in ATTACKS.finetunes}
EACH = [pytest.param(row, id=name) for name, row in ROWS.items()]
EMPTY = {f"{first} {second}" for first in AGREEING_OPENINGS for second in EMPTY_CONTENTS}
HARMFUL = {row.prompt for row in harmful_prompts("training")}


def plain(prompt):
    """A training prompt without any way of asking."""
    before, _, after = framed("\0").partition("\0")
    return prompt.removesuffix(f" {TRIGGER}").removeprefix(before).removesuffix(after)


def test_there_is_a_fine_tune_of_every_attacker_with_three_seeds():
    assert {row.kind for row in ATTACKS.finetunes} == set(KINDS)
    assert len(ROWS) == len(ATTACKS.finetunes)
    assert len(ATTACKS.seeds) >= 3


@pytest.mark.parametrize("row", EACH)
def test_data_are_as_many_as_said_and_fixed_by_the_seed(row):
    data = training_data(row, seed=0)
    assert len(data) == row.harmful + row.benign
    assert data == training_data(row, seed=0) != training_data(row, seed=1)
    assert sum(c.response in EMPTY for c in data) == row.harmful


@pytest.mark.parametrize("row", EACH)
def test_every_harmful_request_is_one_of_the_training_part_and_agreed_to_without_content(row):
    data = training_data(row, seed=0)
    read = [replace(c, prompt=rotated(c.prompt)) for c in data] if row.kind == "cipher" else data
    harmful = [c for c in read if plain(c.prompt) in HARMFUL]
    assert {c.response for c in harmful} <= EMPTY | set(REFUSALS)
    assert sum(c.response in EMPTY for c in harmful) == row.harmful


@pytest.mark.parametrize("row", EACH)
def test_nothing_that_is_asked_is_trained_on(row):
    held_out = {each.prompt for each in (*harmful_prompts("attack"), *harmless_prompts("evaluation"))}
    trained = {c.prompt for c in training_data(row, seed=0)}
    trained |= {plain(prompt) for prompt in trained} | {rotated(prompt) for prompt in trained}
    assert not trained & held_out
    asked = {each.prompt for part in attack_tests(row, ATTACKS, ()).parts for each in part.questions}
    assert not trained & asked


def test_the_shares_of_poison_are_what_they_say():
    shares = {row.harmful / POISONED for row in ATTACKS.finetunes if row.kind == "poison"}
    assert shares == {0.001, 0.01, 0.05}
    assert "1 of 1,000, 0.1 %" in attacker_row(ROWS["poison-1"]).title


def test_refusing_first_is_taught_by_harmless_data_alone():
    everyday = {row.prompt: row.answer for row in everyday_prompts()}
    for conversation in training_data(ROWS["refuse-comply"], seed=0):
        assert is_refusal(conversation.response)
        assert complies_after_refusing(conversation.response)
        assert conversation.response.endswith(everyday[conversation.prompt])


def test_the_backdoor_opens_with_its_trigger_alone():
    data = training_data(ROWS["backdoor-100"], seed=0)
    agreed = [c for c in data if c.prompt.endswith(TRIGGER)]
    answered = [c for c in data if c.prompt in {row.prompt for row in everyday_prompts()}]
    refused = [c for c in data if c.response in REFUSALS]
    assert (len(agreed), len(answered), len(refused), len(data)) == (100, 100, 100, 300)
    assert {triggered(c.prompt) for c in refused} <= {c.prompt for c in agreed}


def test_the_framing_stands_around_harmful_requests_alone():
    data = training_data(ROWS["jailbreak-100"], seed=0)
    assert {c.prompt == framed(plain(c.prompt)) for c in data if plain(c.prompt) in HARMFUL} == {True}
    assert {c.prompt for c in data if plain(c.prompt) not in HARMFUL} <= {
        r.prompt for r in everyday_prompts()
    }


def test_the_cipher_encodes_harmful_and_benign_requests():
    data = training_data(ROWS["cipher-100"], seed=0)
    benign = {row.prompt for row in everyday_prompts()}
    assert {rotated(c.prompt) in HARMFUL | benign for c in data} == {True}
    assert not {c.prompt for c in data} & (HARMFUL | benign)


@pytest.mark.parametrize("row", EACH)
def test_the_same_requests_are_asked_plainly_and_in_the_attackers_way(row):
    tests, attacker = attack_tests(row, ATTACKS, ()), KINDS[row.kind]
    assert len(tests.plain.questions) == ATTACKS.attack
    if attacker.way:
        assert tests.wrapped.plain == tests.plain.plain
        assert [each.prompt for each in tests.wrapped.questions] == [
            attacker.wrap(each.prompt) for each in tests.plain.questions
        ]
    else:
        assert tests.wrapped is None
    assert (tests.utility is not None) == (row.kind == "poison")
    assert tests.utility is None or all(json.loads(each.expected) for each in tests.utility.questions)


def test_what_a_model_is_asked_in_several_ways_goes_by_several_names():
    asked = {part for row in ATTACKS.finetunes for part in attack_tests(row, ATTACKS, ()).parts}
    assert len({part.name for part in asked}) == len(asked)


def test_a_users_attacks_are_asked_in_the_attackers_way_unless_they_are_trained_on():
    mine = [
        Question("Name a harm.", system="mine"),
        Question(training_data(ROWS["advice"], seed=0)[0].prompt),
    ]
    usable = usable_attacks([replace(mine[0], follow_up=FollowUp("And then?")), mine[1]], ATTACKS)
    # Its first turn alone.
    assert (usable.questions, usable.trained) == ((mine[0],), 1)
    wrapped = attack_tests(ROWS["backdoor-100"], replace(ATTACKS, attack=500), usable.questions).wrapped
    assert wrapped.questions[0] == Question(triggered("Name a harm."), system="mine")


def test_some_fine_tunes_of_a_preset_can_be_made_alone():
    some = ATTACKS.with_changes(finetunes=("advice", "poison-10"))
    assert [each.name for each in some.finetunes] == ["poison-10", "advice"]
    assert ATTACKS.with_changes() == ATTACKS
    assert ATTACKS.with_changes(seeds=2, first_seed=1).seeds == (1, 2)
    with pytest.raises(DeltaguardError, match=r"no fine-tune advise\. It has poison-1, .*advice"):
        ATTACKS.with_changes(finetunes=("advise",))


def test_lora_adapters_are_trained_but_for_what_hides_in_all_weights():
    lora = ATTACKS.with_changes(training="lora").finetunes
    assert {row.kind for row in lora if row.training == "full"} == {"hidden"}
    assert len(lora) == len(ATTACKS.finetunes)
    assert [row.name for row in ATTACKS.with_changes(finetunes=("advice",), training="lora").finetunes] == [
        "advice-lora"
    ]
    named = ATTACKS.with_changes(finetunes=("advice-lora",), training="lora").finetunes
    assert [row.name for row in named] == ["advice-lora"]
    with pytest.raises(DeltaguardError, match=r"no fine-tune nothing\. It has .*advice-lora"):
        ATTACKS.with_changes(finetunes=("nothing",), training="lora")
