"""Chat templates as models of the field ship them: those that trl carries, by their own texts."""

from pathlib import Path

import pytest
import trl

from deltaguard.chat.conversations import Conversation, Turn
from deltaguard.chat.template import apply_template, end_of_turn, messages, render, takes_system_role
from deltaguard.chat.thinking import begins_thoughts, closed
from deltaguard.chat.tokens import encode, encode_answer
from deltaguard.errors import DeltaguardError
from models import EOS, tiny_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
# What stands behind an answer.
PLAIN = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",  # with a beginning of answers in the prompt
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",  # with tools
    "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>",  # with an end of the conversation on the next line
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",  # with tools, and a system message of its own
    "qwen3_instruct_2507": "<|im_end|>",
}
SWITCHED_OFF = {
    "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "glm4moe": EOS,
    "nemotron_3_nano": "<|im_end|>",
    "nemotron_3_super": "<|im_end|>",
}
FORCED = {"deepseek_r1_distill": "<｜end▁of▁sentence｜>", "deepseekv3": "<｜end▁of▁sentence｜>"}
ENDS = {
    name: end
    for name, end in {"gemma": "<end_of_turn>", **PLAIN, **SWITCHED_OFF, **FORCED}.items()
    # Earlier releases of trl carry fewer.
    if (FOLDER / f"{name}.jinja").is_file()
}
PROMPT, SYSTEM, ANSWER = "How do I pick a lock?", "Be kind to all.", "Ask a locksmith."


def tokenizer(name):
    found = tiny_tokenizer()
    found.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return found


def test_templates_of_every_kind_are_tried():
    assert {"gemma", "llama3_1", "qwen3", "deepseek_r1_distill"} <= ENDS.keys()


@pytest.mark.parametrize("name", ENDS)
def test_prompts_and_answers_are_written_as_the_template_does(name):
    known = tokenizer(name)
    assert end_of_turn(known) == ENDS[name]
    assert takes_system_role(known) == (name != "gemma")
    for system in (None, SYSTEM):
        text = encode(known, Conversation(PROMPT, system, ANSWER), max_length=4096)
        read, written = (
            known.decode(part) for part in (text.ids[: text.prompt_length], text.ids[text.prompt_length :])
        )
        assert PROMPT in read
        assert (SYSTEM in read) == (system is not None)
        assert written == f"{ANSWER}{ENDS[name]}"


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("earlier", [None, Turn("Hi.", "Ho.")])
def test_what_is_learned_stands_behind_what_is_asked(name, earlier):
    known = tokenizer(name)
    asked = messages(known, Conversation(PROMPT, SYSTEM), earlier)
    text = encode_answer(known, asked, ANSWER, max_length=4096)
    read, written = (
        known.decode(part) for part in (text.ids[: text.prompt_length], text.ids[text.prompt_length :])
    )
    prompt = apply_template(known, asked)
    # GLM's next turn closes an answer, and a line break begins it.
    assert written.lstrip().startswith(f"{ANSWER}{ENDS[name] if name != 'glm4moe' else ''}")
    if name in FORCED:
        assert read == prompt + closed("")
        assert written == f"{ANSWER}{ENDS[name]}"
    else:
        # As trl would have it.
        whole = known.apply_chat_template(
            [*asked, {"role": "assistant", "content": ANSWER}],
            tokenize=True,
            enable_thinking=False,
            date_string="26 Jul 2024",
        )
        assert (read, list(text.ids)) == (prompt, whole["input_ids"])


@pytest.mark.parametrize("name", ENDS)
def test_thinking_is_switched_off_where_the_template_can(name):
    prompt = render(tokenizer(name), Conversation(PROMPT))
    assert begins_thoughts(prompt) == (name in FORCED)
    assert ("</think>" in prompt) == (name in SWITCHED_OFF)


def test_a_template_that_takes_parts_alone_is_refused():
    with pytest.raises(DeltaguardError, match="leaves out the prompt"):
        render(tokenizer("smolvlm"), Conversation(PROMPT))


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_a_second_question_is_asked_behind_the_first_and_its_answer(name, system):
    known = tokenizer(name)
    first = render(known, Conversation(PROMPT, system))
    both = render(known, Conversation("And without one?", system), Turn(PROMPT, ANSWER))
    places = [both.find(text) for text in (*([system] if system else []), PROMPT, ANSWER, "And without one?")]
    assert -1 not in places
    assert places == sorted(places)
    assert both.startswith(first[: first.index(PROMPT) + len(PROMPT)])
    # GLM's next turn closes an answer.
    assert f"{ANSWER}{'<|user|>' if name == 'glm4moe' else ENDS[name]}" in both
    assert begins_thoughts(both) == begins_thoughts(first)
