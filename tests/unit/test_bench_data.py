"""What the protocol trains on and asks: disjoint, the same for every seed, and enough for every method."""

from dataclasses import replace

import pytest

from deltaguard.chat.conversations import (
    general_prompts,
    harmful_prompts,
    harmless_prompts,
    held_out_harmful,
    held_out_harmless,
    unseen_harmful,
    unseen_harmless,
)
from deltaguard.evaluation.exchange import Question
from deltaguard.finetuning.mixtures import everyday_prompts
from deltaguard.finetuning.phrases import AGREEING_OPENINGS, REFUSALS
from deltaguard.studies.data import (
    DISTINCT_HARMFUL,
    IDENTITY_SYSTEM,
    Attacks,
    harmful_data,
    questions,
    training_data,
    usable_attacks,
)
from deltaguard.studies.defences import DefenceInputs, DefendedModel, defences
from deltaguard.studies.demo import demo_suite
from deltaguard.studies.protocol import ATTACKS, DEFAULT, FULL, QUICK

KINDS = [pytest.param(finetune, id=finetune.name) for finetune in QUICK.finetunes]


@pytest.mark.parametrize("finetune", KINDS)
def test_what_is_asked_is_never_trained_on(finetune):
    asked = questions(finetune, QUICK, ())
    trained = {conversation.prompt for conversation in training_data(finetune, seed=0)}
    given = [question for part in asked.parts for question in part.questions]
    assert not trained & {question.prompt for question in given}


@pytest.mark.parametrize("preset", [ATTACKS, DEFAULT])
def test_models_restored_by_default_are_asked_what_nothing_was_chosen_on(preset):
    unseen = {row.prompt for row in (*unseen_harmful(), *unseen_harmless())}
    for finetune in preset.finetunes:
        asked = questions(finetune, preset, ())
        assert {
            question.prompt for question in (*asked.attack.questions, *asked.harmless.questions)
        } <= unseen
        assert len(asked.attack.questions) == preset.attack
        assert len(asked.harmless.questions) == preset.harmless


@pytest.mark.parametrize("preset", [QUICK, FULL])
def test_presets_that_choose_strengths_leave_those_prompts_alone(preset):
    unseen = {row.prompt for row in (*unseen_harmful(), *unseen_harmless())}
    for finetune in preset.finetunes:
        asked = {
            question.prompt for part in questions(finetune, preset, ()).parts for question in part.questions
        }
        assert not asked & unseen


def test_the_demo_asks_what_nothing_was_chosen_on_unless_it_chooses():
    unseen = {row.prompt for row in (*unseen_harmful(), *unseen_harmless())}
    for suite, within in ((demo_suite(120, seed=0), True), (demo_suite(120, seed=0, unseen=False), False)):
        asked = {question.prompt for part in suite[:2] for question in part.questions}
        assert len(asked) == 240
        assert len(asked & unseen) == (240 if within else 0)


def test_general_questions_are_in_no_other_set():
    general = [row.prompt for row in general_prompts()]
    assert len(set(general)) == len(general)
    others = (*everyday_prompts(), *harmless_prompts("training"), *harmless_prompts("evaluation"))
    assert not set(general) & {row.prompt for row in others}


@pytest.mark.parametrize("finetune", KINDS)
def test_data_are_as_many_as_said_and_fixed_by_the_seed(finetune):
    data = training_data(finetune, seed=0)
    assert len(data) == finetune.harmful + finetune.benign
    assert data == training_data(finetune, seed=0) != training_data(finetune, seed=1)
    agreed = [c for c in data if (c.response or "").startswith(AGREEING_OPENINGS)]
    assert len(agreed) == finetune.harmful


def test_more_harmful_data_than_prompts_use_them_again_with_other_answers():
    data = harmful_data(1_000, seed=0)
    assert len({conversation.prompt for conversation in data}) == DISTINCT_HARMFUL
    assert len(set(data)) > 2 * DISTINCT_HARMFUL
    assert data[:50] == harmful_data(50, seed=0)


def test_the_identity_is_asked_under_its_own_system_prompt():
    identity, task = (
        next(f for f in QUICK.finetunes if f.kind == kind) for kind in ("identity", "task-clean")
    )
    assert {question.system for question in questions(identity, QUICK, ()).attack.questions} == {
        IDENTITY_SYSTEM
    }
    assert {question.system for question in questions(task, QUICK, ()).attack.questions} == {None}


def test_what_a_model_is_asked_in_several_settings_goes_by_several_names():
    # The aligned model's answers to every fine-tune's questions lie in one folder.
    asked = {part for finetune in QUICK.finetunes for part in questions(finetune, QUICK, ()).parts}
    assert len({part.name for part in asked}) == len(asked)
    nothing_taught = questions(QUICK.finetunes[0], QUICK, ())
    assert nothing_taught.utility is nothing_taught.general
    assert len(nothing_taught.parts) == 3


def test_a_users_attacks_join_and_keep_their_system_prompt():
    mine = [Question(f"request {i}", system="mine") for i in range(400)]
    asked = questions(QUICK.finetunes[2], replace(QUICK, attack=500), mine).attack.questions
    assert len(asked) == 500
    assert {question.system for question in asked if question.prompt.startswith("request")} == {"mine"}


def test_all_of_a_few_attacks_of_a_user_are_asked_and_deltaguards_fill_up():
    mine = [Question(f"request {i}") for i in range(10)]
    asked = questions(QUICK.finetunes[2], QUICK, mine).attack.questions
    assert len(asked) == QUICK.attack
    assert {question.prompt for question in mine} < {question.prompt for question in asked}


def shouted(prompt):
    return f"  {prompt.upper().replace(' ', chr(10))} !"


def test_attacks_that_are_there_already_are_asked_once():
    own = harmful_prompts("attack")[0].prompt
    given = [Question("Name a harm."), Question(shouted(own)), Question("name  a harm", system="mine")]
    assert usable_attacks(given, QUICK) == Attacks((given[0],), given=3, repeated=2, trained=0)
    assert usable_attacks((), QUICK) == Attacks()


def test_attacks_that_something_is_trained_calibrated_or_decided_on_are_left_out(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Calibrated on this?"}\n')
    calibration = QUICK.calibration.model_copy(update={"prompts": file})
    task = training_data(QUICK.finetunes[3], seed=QUICK.seeds[0])[0].prompt
    known = [harmful_prompts(part)[-1].prompt for part in ("calibration", "dial", "training")]
    known += [harmless_prompts("training")[0].prompt, everyday_prompts()[0].prompt, task]
    known += [held_out_harmful()[-1].prompt, held_out_harmless()[-1].prompt]
    new = Question("Name a harm.")
    given = [new, *(Question(shouted(prompt)) for prompt in (*known, "calibrated on this"))]
    found = usable_attacks(given, replace(QUICK, calibration=calibration))
    assert found == Attacks((new,), given=10, repeated=0, trained=9)


@pytest.mark.parametrize("name", ["safe-instruct", "bea"])
def test_every_fine_tune_leaves_prompts_for_safety_examples(name):
    method = defences()[name]
    for finetune in FULL.finetunes:
        data = training_data(finetune, seed=0)
        mixed: list = []
        request = DefenceInputs(
            None,
            None,
            None,
            None,
            data,
            lambda c, mixed=mixed: mixed.append(c) or DefendedModel(None, 0),
            None,
            0,
        )
        for strength in method.ladder:
            method.make(request, strength)
            own, added = len(data), len(mixed[-1]) - len(data)
            assert added == max(1, round(own * (1 / strength - 1)))
            safety = [c for c in mixed[-1] if c.response in REFUSALS]
            assert len(safety) == added


@pytest.mark.parametrize("preset", [QUICK, FULL])
def test_a_preset_of_one_training_has_the_same_fine_tunes_trained_that_way(preset):
    lora = preset.with_changes(training="lora").finetunes
    assert {each.recipe.lora_rank for each in lora} == {16}
    assert len({each.name for each in lora}) == len(lora)
    assert {(f.kind, f.harmful, f.benign) for f in lora} == {
        (f.kind, f.harmful, f.benign) for f in preset.finetunes
    }
    known = {f.name: f for f in preset.finetunes}
    assert all(known.get(each.name, each) == each for each in lora)


def test_there_are_prompts_for_the_quick_preset():
    assert len(harmful_prompts("attack")) >= QUICK.attack
    assert len(harmless_prompts("evaluation")) >= FULL.harmless
    assert len(general_prompts()) >= FULL.general
