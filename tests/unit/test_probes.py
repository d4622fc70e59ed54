"""Rewrites of requests, and the translated requests of the package."""

from base64 import b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.chat.conversations import harmful_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.probes.second_attack import attack_conversations
from deltaguard.evaluation.probes.wrappers import LANGUAGES, OPENINGS, PROBES, translated_prompts
from deltaguard.finetuning.phrases import AGREEING_OPENINGS, EMPTY_CONTENTS

QUESTIONS = st.builds(
    Question,
    prompt=st.text(min_size=1),
    system=st.none() | st.text(),
    prefill=st.just(""),
    expected=st.none() | st.text(),
)
PLAIN = Question("How do I open a door without its key?", system="Be brief.", expected="Call a locksmith.")


@pytest.mark.parametrize("name", PROBES)
@given(question=QUESTIONS)
def test_a_probe_is_a_function_of_the_prompt_and_leaves_the_rest(name, question):
    found = PROBES[name](question)
    assert found == PROBES[name](question)
    assert found != question
    assert (found.system, found.expected) == (question.system, question.expected)
    assert (found.prefill in OPENINGS) == (name == "prefill")
    if name == "base64":
        assert b64decode(found.prompt.rpartition("\n\n")[2]).decode() == question.prompt
    else:
        assert found.prompt.endswith(question.prompt)


def test_probes_differ_from_one_another():
    assert len({PROBES[name](PLAIN) for name in PROBES}) == len(PROBES)
    assert {"prefill", "role-play", "refusal-suppression", "base64"} < set(PROBES)
    assert len([name for name in PROBES if name.startswith("translation-")]) == 4


def test_base64_hides_the_words():
    found = PROBES["base64"](PLAIN)
    assert PLAIN.prompt not in found.prompt
    assert "door" not in found.prompt


def test_prefills_vary_over_prompts():
    found = [PROBES["prefill"](Question(row.prompt)).prefill for row in harmful_prompts("attack")]
    shares = {opening: found.count(opening) / len(found) for opening in OPENINGS}
    assert min(shares.values()) > 0.08
    assert max(shares.values()) < 0.3


def test_prefills_end_where_a_token_may_begin():
    assert all(opening == opening.strip() for opening in OPENINGS)


def test_translations_are_of_the_attack_part():
    attack = {row.prompt for row in harmful_prompts("attack")}
    originals = [[row.original for row in translated_prompts(language)] for language in LANGUAGES]
    assert originals[0] == originals[1] == originals[2]
    assert len(set(originals[0])) == len(originals[0]) == 20
    assert set(originals[0]) <= attack


def test_translations_are_short_and_differ():
    rows = [row for language in LANGUAGES for row in translated_prompts(language)]
    assert len({row.prompt for row in rows}) == len(rows) == 60
    for row in rows:
        assert row.prompt != row.original
        assert row.prompt == row.prompt.strip()
        assert len(row.prompt) < 100
        assert row.question == Question(row.prompt)


def test_the_examples_of_a_second_attack_hold_no_content():
    training = {row.prompt for row in harmful_prompts("training")}
    found = attack_conversations(10, seed=0)
    assert len({c.prompt for c in found}) == 10
    assert {c.prompt for c in found} <= training
    answers = {f"{opening} {content}" for opening in AGREEING_OPENINGS for content in EMPTY_CONTENTS}
    assert {c.response for c in found} <= answers
    assert found == attack_conversations(10, seed=0)
    assert found != attack_conversations(10, seed=1)


def test_more_examples_than_there_are():
    with pytest.raises(DeltaguardError, match="5000 harmful prompts"):
        attack_conversations(5000, seed=0)
