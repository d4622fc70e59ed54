"""A chat template is a program from outside: whatever it does ends, in text or in one message."""

import gc
import threading
import time
from datetime import date

import pytest

import models
from deltaguard.chat.conversations import Conversation, Turn
from deltaguard.chat.template import (
    TemplateFailedError,
    apply_template,
    end_of_turn,
    readable_turns,
    render,
    require_turns,
    takes_system_role,
)
from deltaguard.chat.tokens import encode, encode_answer
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Exchange
from deltaguard.evaluation.judges import guards
from deltaguard.time_limit import run_within

USER = [{"role": "user", "content": "How?"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _nothing_is_collected():
    """What is raised while garbage is collected is lost, and raised again a second later only."""
    gc.disable()
    yield
    gc.enable()


def tokenizer(template):
    made = models.tiny_tokenizer()
    made.chat_template = template
    return made


def stopped(template, seconds=0.2):
    started = time.monotonic()
    with pytest.raises(DeltaguardError, match=r"takes more than 0.2 s for a conversation of user"):
        apply_template(tokenizer(template), USER, seconds=seconds)
    return time.monotonic() - started


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{% macro f(n) %}{% for i in range(99999) %}{{ i }}{% endfor %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(template):
    assert stopped(template) < 3


def test_it_is_stopped_in_any_thread_and_no_other_thread_is():
    found = []
    thread = threading.Thread(target=lambda: found.append(stopped(ENDLESS)))
    thread.start()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        pass
    thread.join()
    assert found[0] < 3


def test_a_call_that_ends_at_the_limit_leaves_nothing_behind():
    def busy(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass

    outcomes = set()
    for step in range(200):
        try:
            outcomes.add(run_within(0.005, lambda step=step: busy(step / 10_000), message="too long"))
        except DeltaguardError as error:
            outcomes.add(str(error))
        # An exception that arrived late would end the test here.
        busy(0.002)
    assert outcomes == {None, "too long"}


def test_what_the_call_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        run_within(5.0, lambda: 1 / 0, message="too long")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 9 ** 9 ** 9 }}", "raises a number to a power"),
        ("{% set n = namespace(x=9) %}{% set n.x = n.x * n.x %}", "multiplies numbers"),
        ("{{ 'a@' | urlize }}", "uses the filter urlize"),
        ("{% generation %}{{ 9 ** 9 ** 9 }}{% endgeneration %}", "raises a number to a power"),
    ],
)
def test_a_single_step_without_end_is_refused_before_it_is_taken(template, told):
    with pytest.raises(DeltaguardError, match=told):
        apply_template(tokenizer(template), USER)


def test_indentation_by_multiplication_is_allowed():
    template = "{% set depth = 2 %}{{ ' ' * depth * depth }}{{ 4 * depth }}{{ messages[0].content }}"
    assert apply_template(tokenizer(template), USER) == "    8How?"


def test_a_template_that_writes_without_end_is_refused():
    template = "{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}"
    with pytest.raises(DeltaguardError, match=r"makes 9,989,001 characters of 4"):
        apply_template(tokenizer(template), USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('I refuse') }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages[0].content.gone.deeper }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'a' * 99999999999999999999 }}",
        "{{ 'a'.encode('no-such-encoding') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content | int | tojson | fromjson }}",
        "{% for",
        "{{" + "(" * 5000 + ")" * 5000 + "}}",
    ],
)
def test_whatever_a_template_raises_is_one_message(template):
    with pytest.raises(
        DeltaguardError, match=r"The chat template of '.*' fails on a conversation of user: ."
    ):
        render(tokenizer(template), "How?")
    with pytest.raises(DeltaguardError, match=r"The chat template of '.*' fails on a conversation of user"):
        encode(tokenizer(template), Conversation("How?", response="So."), max_length=99)
    assert not takes_system_role(tokenizer(template))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[5].content }}"])
def test_a_guard_whose_template_fails_is_one_message(template, monkeypatch):
    judge = guards.GuardJudge(guards.GuardSpec(model="guard", template="llama-guard"))
    monkeypatch.setattr(guards.GuardJudge, "_loaded", (None, tokenizer(template)))
    with pytest.raises(DeltaguardError, match="fails on a conversation of user, assistant"):
        judge.judge([Exchange("How?", "So.")])


@pytest.mark.parametrize("others", [[], [{"role": "assistant", "content": "So."}]])
def test_a_system_message_that_no_users_follows_has_no_place(others):
    turns = [{"role": "system", "content": "Be kind."}, *others]
    with pytest.raises(TemplateFailedError, match="takes no system message"):
        readable_turns(tokenizer(NO_SYSTEM_ROLE), turns)


SHOWN_UNTIL_ANSWERED = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}" + models.EOS + "{% endif %}{% endfor %}"
)
"""As Mistral's: the system message stands in the last question."""

HEADER_IN_ANY_CASE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + models.EOS + "{% endfor %}<|assistant|>"
)
"""As that of the first Llama 3."""


def test_a_system_message_that_is_gone_once_it_is_answered_heads_the_question():
    known = tokenizer(SHOWN_UNTIL_ANSWERED)
    assert not takes_system_role(known)
    turns = readable_turns(known, [{"role": "system", "content": "Be kind."}, *USER])
    text = encode_answer(known, turns, "So.", max_length=99)
    assert known.decode(text.ids) == f"[INST]Be kind.\n\nHow?[/INST]So.{models.EOS}"
    assert known.decode(text.ids[text.prompt_length :]) == f"So.{models.EOS}"


def test_where_the_next_answer_begins_is_no_part_of_this_one():
    known = tokenizer(HEADER_IN_ANY_CASE)
    assert end_of_turn(known) == models.EOS
    assert encode(known, Conversation("How?", response="So."), max_length=99).ids[-1] == known.eos_token_id


@pytest.mark.parametrize(
    ("behind_a_turn", "at_the_end", "end"),
    [("<|end|>", models.EOS, "<|end|>"), (f"<|end|>{models.EOS}", "", f"<|end|>{models.EOS}")],
    ids=["as that of Phi-4-mini", "of two tokens"],
)
def test_where_the_conversation_ends_is_no_part_of_an_answer(behind_a_turn, at_the_end, end):
    known = tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + behind_a_turn + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}" + at_the_end + "{% endif %}"
    )
    assert end_of_turn(known) == end
    text = encode(known, Conversation("How?", response="So."), max_length=99)
    assert known.decode(text.ids[text.prompt_length :]) == f"So.{end}"


def test_turns_that_are_shown_otherwise_where_an_answer_follows_are_not_learned_from():
    known = tokenizer("{% for m in messages %}{{ loop.length }} {{ m.content }} {% endfor %}")
    with pytest.raises(DeltaguardError, match="shows turns otherwise where an answer follows"):
        encode_answer(known, USER, "So.", max_length=99)


def test_tokens_that_merge_where_the_answer_begins_are_those_that_were_asked():
    known = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    text = encode_answer(known, USER, "?", max_length=99)
    assert list(text.ids[: text.prompt_length]) == known("How?", add_special_tokens=False)["input_ids"]
    assert known.decode(text.ids) == "How??"


def test_a_prompt_with_a_date_is_of_the_same_day_on_every_day():
    known = tokenizer("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    assert apply_template(known, USER) == "26 Jul 2024: How?"
    assert apply_template(known, USER, today=date(2026, 2, 3)) == "03 Feb 2026: How?"


def test_an_empty_system_message_leaves_the_users_as_it_is():
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "How?"}]
    assert readable_turns(tokenizer(NO_SYSTEM_ROLE), turns) == turns[1:]


NO_SYSTEM_ROLE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('No.') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
)


@pytest.mark.parametrize(
    ("system", "head"), [(None, ""), ("", ""), ("Be brief.", "Be brief.\n\n")], ids=["none", "empty", "some"]
)
def test_without_a_system_role_the_system_message_heads_the_first_question(system, head):
    text = render(tokenizer(NO_SYSTEM_ROLE), Conversation("And then?", system), Turn("How?", "So."))
    assert text == f"[user]{head}How?[assistant]So.[user]And then?[assistant]"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}",
        "{% if messages | length > 1 %}{{ 1 / 0 }}{% endif %}{{ messages[0].content }}",
    ],
    ids=["the last alone", "questions alone", "fails"],
)
def test_a_template_of_one_turn_is_refused_and_never_asked_without_the_first(template):
    known = tokenizer(template)
    assert render(known, "How?") == "How?"
    told = r"The chat template of '.*' does not show a model what was said before a question"
    with pytest.raises(DeltaguardError, match=told):
        require_turns(known)
    with pytest.raises(DeltaguardError, match=told):
        render(known, Conversation("And then?"), Turn("How?", "So."))
