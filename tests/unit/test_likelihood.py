"""Negative log-likelihood of responses, against a direct computation."""

import pytest
import torch

import models
from deltaguard.chat.conversations import Conversation
from deltaguard.chat.predictions import negative_log_likelihood
from deltaguard.chat.template import render
from deltaguard.errors import DeltaguardError

ANSWERED = [
    Conversation("How?", "", "I'm sorry, but I cannot help with that."),
    Conversation("What is the best way to make a cake at home, with other people?", "Be kind.", "No."),
    Conversation("Write a text about the weather.", None, "It is good this morning, and helpful. " * 4),
    Conversation("Why?", None, "Because."),
]


def directly(model, tokenizer, conversation):
    """From all logits of one unpadded conversation, token by token, in float64."""
    prompt = tokenizer(render(tokenizer, conversation), add_special_tokens=False)["input_ids"]
    answer = tokenizer(conversation.response + models.EOS, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer])
    with torch.inference_mode():
        logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    terms = [-float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("name", models.DENSE)
def test_a_batch_equals_the_direct_computation(name):
    model, tokenizer = models.tiny_model(name), models.tiny_tokenizer()
    expected = [directly(model, tokenizer, conversation) for conversation in ANSWERED]
    found = negative_log_likelihood(model, tokenizer, ANSWERED, batch_size=len(ANSWERED))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 3) for value in found}) == len(ANSWERED)


def test_the_batch_size_does_not_matter():
    model, tokenizer = models.tiny_model("llama"), models.tiny_tokenizer()
    found = [negative_log_likelihood(model, tokenizer, ANSWERED, batch_size=size) for size in (1, 2, 3, 50)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_prompts_put_no_logits_through_the_output_layer():
    model, tokenizer = models.tiny_model("llama"), models.tiny_tokenizer()
    seen = []
    model.lm_head.register_forward_hook(lambda _m, inputs, _y: seen.append(inputs[0].shape[1]))
    short = Conversation("What is the best way to make a cake at home?" * 3, response="No.")
    negative_log_likelihood(model, tokenizer, [short], batch_size=1)
    assert seen == [len(tokenizer("No." + models.EOS, add_special_tokens=False)["input_ids"])]


def test_a_model_that_knows_nothing_finds_all_tokens_equally_likely():
    model, tokenizer = models.tiny_model("llama"), models.tiny_tokenizer()
    model.lm_head.weight.data.zero_()
    found = negative_log_likelihood(model, tokenizer, ANSWERED, batch_size=2)
    assert found == pytest.approx([torch.log(torch.tensor(float(models.VOCABULARY))).item()] * len(ANSWERED))


def test_half_precision_takes_the_softmax_in_float32():
    model, tokenizer = models.tiny_model("llama").to(torch.bfloat16), models.tiny_tokenizer()
    found = negative_log_likelihood(model, tokenizer, ANSWERED[:1], batch_size=1)
    assert found == pytest.approx([directly(model, tokenizer, ANSWERED[0])], rel=1e-5)


def test_nothing_gives_nothing():
    assert (
        negative_log_likelihood(models.tiny_model("llama"), models.tiny_tokenizer(), [], batch_size=4) == []
    )


@pytest.mark.parametrize("response", [None, ""])
def test_a_missing_response_is_named(response):
    conversations = [*ANSWERED, Conversation("Who are you?", response=response)]
    with pytest.raises(DeltaguardError, match=r"1 of 5 conversations .* 'Who are you\?'"):
        negative_log_likelihood(
            models.tiny_model("llama"), models.tiny_tokenizer(), conversations, batch_size=4
        )


def test_a_conversation_that_does_not_fit_is_named():
    model = models.tiny_model("llama", max_position_embeddings=64)
    with pytest.raises(DeltaguardError, match=r"1 of 4 .* 64 tokens .* 'Write a text about the weather\.'"):
        negative_log_likelihood(model, models.tiny_tokenizer(), ANSWERED, batch_size=4)
