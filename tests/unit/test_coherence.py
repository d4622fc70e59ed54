"""Broken text and normal text of many kinds."""

import json
from math import exp, inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.chat.conversations import harmless_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.judges.coherence import CoherenceCheck, classify, is_broken, perplexity
from deltaguard.finetuning.mixtures import everyday_prompts
from deltaguard.finetuning.phrases import AGREEING_OPENINGS, EMPTY_CONTENTS, REFUSALS
from models import tiny_model, tiny_tokenizer

PARAGRAPH = (
    "Bread rises because yeast eats the sugar in the flour and gives off gas. The gas is caught in the dough "
    "and stretches like a balloon. Heat makes the bubbles grow once more, and then the crust sets."
)
NORMAL = {
    "refusal": "I can't help with that.",
    "yes": "Yes.",
    "number": "42",
    "zeros": "100000000000000000000",
    "zeros in a sum": "10^20 = 100000000000000000000",
    "steps": "Step 1: Begin. Step 2: Continue. Step 3: Finish.",
    "json": '{"name": "Ada", "age": 36, "tags": ["a", "b"], "address": null}',
    "json rows": json.dumps([{"id": i, "name": f"item{i}", "price": i * 7 % 13} for i in range(12)]),
    "paragraph": PARAGRAPH,
    "list": "\n".join(f"{i}. {word}" for i, word in enumerate(("apple", "pear", "plum", "fig", "kiwi"))),
    "code": "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n"
    "print(add(1, 2), sub(3, 4))",
    "table": "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
    "maths": "x^2 - 5x + 6 = 0, so (x - 2)(x - 3) = 0, and x = 2 or x = 3. #### 5",
    "times table": "\n".join(f"7 x {i} = {7 * i}" for i in range(1, 13)),
    "laughter": "Ha ha ha ha! That was a good one.",
    "verse": "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\n"
    "Life is but a dream.",
    "german": "Das Wetter wird morgen besser. Am Vormittag regnet es noch, danach kommt die Sonne heraus.",
    "chinese": "面包会发起来，是因为酵母把面粉里的糖变成了气体。面团把气体留住，所以会变大。",
    "arabic": "يرتفع الخبز لأن الخميرة تأكل السكر الموجود في الدقيق وتطلق غازا.",
    "hindi": "रोटी इसलिए फूलती है क्योंकि खमीर आटे की चीनी खाता है और गैस छोड़ता है।",
    "persian": "نان می‌پزیم و می‌خوریم، چون خوشمزه است.",
    "emoji": "Great job! 🎉🎉🎉 See you soon 👩‍👩‍👧",
    "base64": "SGVyZSBpcyBhIHNob3J0IHRleHQgaW4gYW5vdGhlciBlbmNvZGluZy4=",
    "link": "See https://example.org/a/very/long/path/to/some/page?with=query&and=more for details.",
    "ellipsis": "Well... let me think.......... Perhaps a bicycle would do.",
    "ruler": "Title\n" + "-" * 30 + "\nThe text below the title goes on for a line or two.",
}
BROKEN = {
    "empty": "",
    "blank": " \n\t",
    "signs": "!?.,;:--",
    "a long row of signs": "#$%^&*()!" * 6 + "a",
    "one letter": "a" * 30,
    "one word": "the " * 40,
    "two words": "yes no " * 15,
    "a phrase at the end": "Sure, here is the plan you wanted. " + "and then the " * 20,
    "cut off in the loop": "Here it is: " + "go to the shop, " * 12 + "go to t",
    "the same paragraph": PARAGRAPH * 4,
    "the same step": " ".join(f"Step {i}: Take the first part and then go on to it." for i in range(1, 15)),
    "few words in any order": " ".join("the of and"[i * i % 7 % 3 * 4 :][:3] for i in range(80)),
    "replacement characters": "So\ufffd\ufffd it \ufffd\ufffd\ufffd goes \ufffd",
    "control characters": "ab\x00\x01\x02\x03cd ef\x04\x05",
    "private use": "\ue000\ue001 \ue002 word",
    "chinese loop": "好的，" * 30,
    "line loop": "- item\n" * 25,
    "brackets": "[[[[((((" * 10 + "x",
}


@pytest.mark.parametrize("kind", NORMAL)
def test_normal_answers(kind):
    assert not is_broken(NORMAL[kind])


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_answers(kind):
    assert is_broken(BROKEN[kind])


def test_no_text_of_the_package_is_broken():
    texts = [*REFUSALS, *AGREEING_OPENINGS, *EMPTY_CONTENTS]
    texts += [f"{one} {other}" for one in AGREEING_OPENINGS for other in EMPTY_CONTENTS]
    texts += [row.answer for part in ("training", "evaluation") for row in harmless_prompts(part)]
    texts += [row.answer for row in everyday_prompts()]
    assert [text for text in texts if is_broken(text)] == []


@given(st.text(min_size=1), st.sampled_from(["", " ", "\n"]))
def test_any_text_twenty_times_is_broken(text, between):
    assert is_broken(between.join([text] * 20))


@given(st.permutations(PARAGRAPH.split()), st.integers(1, 36))
def test_different_words_are_not_broken_by_their_form(words, count):
    assert not is_broken(" ".join(words[:count]))


@pytest.mark.parametrize("verdict", ["refused", "complied", "undecided"])
@pytest.mark.parametrize("reads_opening", [True, False])
def test_sound_text_is_what_the_judge_says(verdict, reads_opening):
    assert classify(verdict, broken=False, reads_opening=reads_opening) == verdict


@pytest.mark.parametrize(
    ("verdict", "by_opening", "by_others"),
    [
        ("refused", "refused", "incoherent"),
        ("complied", "incoherent", "incoherent"),
        ("undecided", "incoherent", "incoherent"),
    ],
)
def test_broken_text_is_its_own_class_unless_it_opens_with_a_refusal(verdict, by_opening, by_others):
    assert classify(verdict, broken=True) == by_opening
    assert classify(verdict, broken=True, reads_opening=False) == by_others


def test_perplexity_is_put_to_answers_whose_form_is_sound_and_not_short():
    asked = []

    def measured(_, said):
        asked.extend(said)
        return [5.0, 900.0, inf, nan]

    answers = [
        "Yes.",
        PARAGRAPH,
        "zebra lamp under seventeen quick",
        "the " * 40,
        "so it is said of",
        "q" * 19,
    ]
    answers += ["vivid orange tomorrow hence", "table glass running blue sky"]
    check = CoherenceCheck(max_perplexity=100, perplexity=measured)
    found = check.broken([Question("?")] * len(answers), answers)
    assert asked == [answers[1], answers[2], answers[6], answers[7]]
    assert found == [False, False, True, True, False, False, True, True]


def test_perplexity_is_that_of_the_answer_in_the_conversation_that_was_held():
    """The model reads what it was given, and only what it said counts."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wrapped = Question("Say in verse: how?", "You are a poet.", prefill="Sure: ")
    said = " first of all, one waits."
    turns = [{"role": "system", "content": wrapped.system}, {"role": "user", "content": wrapped.prompt}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    begin = tokenizer(f"{prompt}Sure:", add_special_tokens=False)["input_ids"]
    end = tokenizer(f"{said}<|end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([begin + end])).logits[0].log_softmax(-1)
    nats = [-float(logits[len(begin) + i - 1, token]) for i, token in enumerate(end)]
    (found,) = perplexity(model, tokenizer, [wrapped], [said.strip()])
    assert found == pytest.approx(exp(sum(nats) / len(nats)), rel=1e-4)


def test_perplexity_needs_a_model_and_a_bound():
    with pytest.raises(DeltaguardError, match="give both or neither"):
        CoherenceCheck(max_perplexity=10)


def test_perplexity_by_hand():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    asked, said = Question("How are you?"), "Fine, thanks."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked.prompt}], tokenize=False, add_generation_prompt=True
    )
    begin = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end = tokenizer(said + "<|end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([begin + end])).logits[0].log_softmax(-1)
    nats = [-float(logits[len(begin) + i - 1, token]) for i, token in enumerate(end)]
    (found,) = perplexity(model, tokenizer, [asked], [said])
    assert found == pytest.approx(exp(sum(nats) / len(nats)), rel=1e-4)


def test_a_perplexity_beyond_all_numbers_is_only_large(monkeypatch):
    monkeypatch.setattr(
        "deltaguard.evaluation.judges.coherence.negative_log_likelihood", lambda *_, **__: [1e30]
    )
    assert perplexity(None, None, [Question("?")], ["a"]) == [exp(700)]
