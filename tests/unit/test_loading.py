"""Loading through transformers: whatever it raises is one message, and what has no end is not begun."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import models
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.exchange import Decoding, Question
from deltaguard.models.loading import (
    empty_model,
    foreign,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
    vocabulary_size,
)


@pytest.fixture
def model(tmp_path):
    return models.save(models.tiny_model("llama"), tmp_path / "model")


def changed(model, name="config.json", **fields):
    path = model / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": 2001},
        {"num_hidden_layers": 1e9},
        {"model_type": "gpt2", "n_layer": 10**9},
        {"model_type": "mixtral", "num_local_experts": 10**9},
        {"text_config": {"num_hidden_layers": 10**12}},
    ],
)
@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model, empty_model])
def test_a_model_with_more_layers_than_any_has_is_not_begun(model, fields, load):
    started = time.monotonic()
    with pytest.raises(DeltaguardError, match=r"config\.json of mine asks for more than 1,000 parts"):
        load(changed(model, **fields), "mine")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("fields", "load"),
    [
        ({"hidden_size": "wide"}, load_config),
        ({"rope_parameters": 3}, load_config),
        ({"model_type": "no-such"}, load_config),
        ({"num_attention_heads": 0}, empty_model),
        ({"hidden_act": "none-such"}, empty_model),
        ({"hidden_size": 64}, load_model),
    ],
)
def test_whatever_transformers_raises_is_one_message(model, fields, load):
    with pytest.raises(DeltaguardError, match=r"^transformers cannot (read|build|load) .*mine"):
        load(changed(model, **fields), "mine")


def test_a_panic_in_rust_is_one_message():
    with pytest.raises(DeltaguardError, match=r"^It fails: ."), foreign("It fails"):
        # Built on a vocabulary that does not hold what it is asked for.
        raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_an_interrupt_is_none():
    with pytest.raises(KeyboardInterrupt), foreign("It fails"):
        raise KeyboardInterrupt


def test_a_message_without_end_is_cut_off():
    with pytest.raises(DeltaguardError) as caught, foreign("It fails"):
        raise ValueError("a" * 10**6)
    assert len(str(caught.value)) < 3000


def test_tokens_without_an_embedding_are_refused_wherever_they_are_put_in(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    moved = {token: 5000 + i for token, i in vocabulary.items() if i > 300}
    tokenizer["model"]["vocab"] = vocabulary | moved
    assert vocabulary[last] < 5000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    Tokenizer.from_file(str(model / "tokenizer.json"))
    engine = TransformersEngine.open(str(model), device="cpu")
    question = Question("How can I make a good cake? What is the best way?", expected="Explain the steps.")
    for ask in (lambda: engine.answer([question], Decoding(2)), lambda: engine.likelihood([question])):
        with pytest.raises(
            DeltaguardError, match=r"gives the token 5\d+, and the model has embeddings for 384"
        ):
            ask()


def test_a_token_with_an_id_that_no_vocabulary_has_is_refused(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = 2**31
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DeltaguardError, match="has a token with the id 2,147,483,648"):
        load_tokenizer(model, "mine")
    with pytest.raises(DeltaguardError, match=r"`model\.vocab.*should be less than 16777216"):
        vocabulary_size(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 3, "min_length": 99},
        {"bad_words_ids": [[n] for n in range(3, 90)], "suppress_tokens": list(range(90, 200))},
        {"begin_suppress_tokens": list(range(3, 200)), "forced_eos_token_id": 2},
        {"sequence_bias": [[[n], -100.0] for n in range(3, 200)], "guidance_scale": 3.0},
        {"exponential_decay_length_penalty": [1, 9.0], "max_time": 1e-9},
        {"stop_strings": ["a", "e", "i", "o", "u"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"prompt_lookup_num_tokens": 2},
        {"top_h": 0.1, "do_sample": True},
    ],
)
def test_a_models_own_settings_change_neither_how_many_answers_there_are_nor_which(model, fields):
    questions = [Question("How?"), Question("Why, then?")]
    plain = TransformersEngine.open(str(model), device="cpu").answer(questions, Decoding(3))
    found = TransformersEngine.open(str(changed(model, "generation_config.json", **fields)), device="cpu")
    assert found.answer(questions, Decoding(3)) == plain


@pytest.mark.parametrize("token", ["two", {"a": 1}, 2**70])
def test_an_end_token_that_is_none_is_one_message(model, token):
    changed(model, "generation_config.json", eos_token_id=token)
    with pytest.raises(DeltaguardError, match="The model cannot answer: "):
        TransformersEngine.open(str(model), device="cpu").answer([Question("How?")], Decoding(2))


def test_weights_that_are_absent_are_no_random_numbers(model):
    tensors = load_file(model / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeltaguardError, match=r"lacks lm_head\.weight, for which its configuration asks"):
        load_model(model, "mine")
    changed(model, "config.json", tie_word_embeddings=True)
    assert load_model(model, "mine").get_output_embeddings().weight.shape == head.shape
    with pytest.raises(DeltaguardError, match=r"mine lacks score\.weight"):
        load_model(model, "mine", classifier=True)


def test_memory_that_is_lacking_is_told_apart():
    with pytest.raises(torch.OutOfMemoryError), foreign("It fails"):
        raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("loaded", ["whole", "skeleton"])
def test_the_output_head_is_given_no_view(model, loaded):
    network = load_model(model, "mine") if loaded == "whole" else skeleton(model, "mine", dtype=torch.float32)
    if loaded == "skeleton":
        network.load_state_dict(load_model(model, "mine").state_dict(), assign=True)
        network.tie_weights()
    seen = []
    network.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        last, every = network(ids, logits_to_keep=1).logits, network(ids).logits
    assert seen[0].is_contiguous()
    assert seen[0].shape[1] == 1
    torch.testing.assert_close(last, every[:, -1:])
