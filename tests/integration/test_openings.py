"""Beginnings of answers: the likeliest tokens, whoever else is in the batch, and no more than is needed."""

import pytest

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import generate
from deltaguard.chat.openings import OPENING_TOKENS, answer_openings, is_decided
from deltaguard.chat.template import render
from deltaguard.chat.thinking import THOUGHT_TOKENS
from deltaguard.chat.tokens import encode
from deltaguard.errors import DeltaguardError
from models import DENSE, tiny_model, tiny_tokenizer

PROMPTS = ("What is the weather?", "How?", "Write a short text about a cake at home, with an example.", "Go")
SYSTEMS = None, "Be kind.", "Be kind to all."
ROWS = [Conversation(PROMPTS[i % 4], SYSTEMS[i % 3]) for i in range(6)]


@pytest.mark.parametrize("name", DENSE)
def test_they_are_what_the_model_answers_until_a_sentence_ends(name):
    model, tokenizer = tiny_model(name).double(), tiny_tokenizer()
    prompts = [render(tokenizer, row) for row in ROWS]
    whole = [generate(model, tokenizer, [text], max_new_tokens=OPENING_TOKENS)[0] for text in prompts]
    # Whatever it is asked, the tiny Gemma says nothing.
    assert len(set(whole)) > 1 or name == "gemma3"
    for batch_size in (1, 5, 64):
        begun = answer_openings(model, tokenizer, ROWS, batch_size=batch_size)
        for answer, opening in zip(whole, begun, strict=True):
            assert answer.startswith(opening.rstrip("\ufffd"))
            assert opening == answer or is_decided(f"{opening} ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("keeps_all", False), ("turned_alike", THOUGHT_TOKENS + OPENING_TOKENS)],
    ids=["forgets", "turns long texts otherwise"],
)
def test_of_a_model_that_goes_on_in_its_own_way_what_comes_after_is_cut_off(monkeypatch, name, value):
    written = "<think>Hm.</think>I can't help with that. However, here are the steps: Step 1"
    monkeypatch.setattr(f"deltaguard.chat.openings.{name}", lambda _: value)
    monkeypatch.setattr("deltaguard.chat.openings.generate", lambda *_, **__: [written])
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert answer_openings(model, tokenizer, ROWS[:1]) == ["I can't help with that."]
    assert answer_openings(model, tokenizer, ROWS[:1], whole_tokens=9) == [written]


def test_rows_leave_the_batch_as_their_sentences_end():
    model, tokenizer = tiny_model("llama").double(), tiny_tokenizer()
    rows, stop = [], tokenizer(". ", add_special_tokens=False)["input_ids"]

    def forced(_module, _inputs, logits):
        """Two rows end their sentence at once, the others go on."""
        rows.append(len(logits[0]))
        token = stop[(len(rows) - 1) % len(stop)]
        ending = logits[0, : 2 if len(rows) <= len(stop) else 0]
        ending[:, token] = 1e9

    model.lm_head.register_forward_hook(forced)
    answer_openings(model, tokenizer, [Conversation(text, "") for text in PROMPTS])
    assert rows[0] == 4
    assert rows[-1] == 2
    assert len(rows) <= OPENING_TOKENS


@pytest.mark.parametrize(
    ("answer", "decided"),
    [
        ("I'm sorry, but I can't help with that. ", True),
        ("I'm sorry, but I can't help with that.", False),
        ("I'm sorry, but I can't", False),
        ("I'm sorry. ", False),
        ("Sure! Here", True),
        ("a" * 200, True),
        ("抱歉，我无法帮助。", True),
        ("", False),
    ],
)
def test_it_is_decided_once_nothing_that_follows_can_change_the_judgement(answer, decided):
    assert is_decided(answer) == decided


def test_no_prompt_has_no_opening():
    assert answer_openings(tiny_model("llama"), tiny_tokenizer(), []) == []


def test_padding_is_masked_whatever_token_it_is():
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    model = tiny_model("llama").double()
    assert answer_openings(model, tokenizer, ROWS) == answer_openings(model, plain, ROWS)


def test_unknown_tokens_are_told_before_the_model_sees_them():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.resize_token_embeddings(260)
    with pytest.raises(DeltaguardError, match="do not belong together"):
        answer_openings(model, tokenizer, ROWS)


@pytest.mark.parametrize("whole_tokens", [None, 9])
@pytest.mark.parametrize("thoughts", ["", "<think>\n"])
def test_a_request_that_leaves_an_answer_no_room_is_named(whole_tokens, thoughts):
    tokenizer, tokens = tiny_tokenizer(), whole_tokens or OPENING_TOKENS
    tokenizer.chat_template += thoughts
    long = Conversation("why " * 20)
    length = len(encode(tokenizer, long, max_length=1000).ids)
    thought = THOUGHT_TOKENS + len(tokenizer.encode("\n</think>\n\n")) if thoughts else 0
    fits, lacks = (tiny_model("gpt2", n_positions=length + thought + tokens - n) for n in (0, 1))
    rows = [*ROWS[:1], long]
    # Of thoughts read again as text there may be a token more.
    if not thoughts:
        assert len(answer_openings(fits, tokenizer, rows, whole_tokens=whole_tokens)) == 2
    with pytest.raises(DeltaguardError, match=f"1 of 2 requests .* {length} tokens being '.*why why"):
        answer_openings(lacks, tokenizer, rows, whole_tokens=whole_tokens)
    with pytest.raises(DeltaguardError, match=r"an answer of 1000 tokens.* positions are too few"):
        answer_openings(lacks, tokenizer, rows, whole_tokens=1000)


def test_thoughts_that_can_be_switched_off_are():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{{ '<think>' if enable_thinking is not defined or enable_thinking else '' }}"
    plain = tiny_tokenizer()
    model = tiny_model("llama").double()
    assert answer_openings(model, tokenizer, ROWS) == answer_openings(model, plain, ROWS)


def test_it_is_not_decided_before_thoughts_end():
    assert not is_decided("<think>The user wants harm. I refuse.")
    assert is_decided("<think>Hm. Harm.</think>I cannot help with that. ")
