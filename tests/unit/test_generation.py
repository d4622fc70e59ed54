"""Generation: a prefix computed once changes no answer, draws repeat, and batches fit the memory."""

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from deltaguard.chat.generation import generate
from deltaguard.chat.prefix import NO_PREFIX, cache_parameter, for_rows, keeps_all, shared_prefix
from deltaguard.chat.tokens import pad
from models import DENSE, EXPERTS, FAMILIES, tiny_model, tiny_tokenizer

SHARED = "<|begin|><|system|>You are a helpful assistant that answers questions.<|end|><|user|>"
REQUESTS = ("What is the weather?", "How?", "Write a short text about a cake at home, with an example.", "Go")
PROMPTS = [f"{SHARED}{request}<|end|><|assistant|>" for request in REQUESTS]
FULL_ATTENTION = {
    name: {"layer_types": ["full_attention", "full_attention"]} for name in ("gemma3", "llama4", "gpt_oss")
}


def double(name):
    """In float64 no two tokens tie within rounding; torch multiplies experts in float32 at most."""
    model = tiny_model(name, **FULL_ATTENTION.get(name, {}))
    return model if name in EXPERTS else model.double()


def encoded(prompts):
    return [tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in prompts]


def alone(model, tokenizer, prompts, **options):
    """One prompt at a time: nothing is padded, and nothing shared."""
    return [generate(model, tokenizer, [prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_shared_prefix_changes_no_answer(name, batch_size):
    model, tokenizer = double(name), tiny_tokenizer()
    assert shared_prefix(model, encoded(PROMPTS), longest=99).length > 8
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert answers == alone(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert len(set(answers)) > 1


@pytest.mark.parametrize("name", DENSE)
def test_logits_after_the_prefix_are_those_of_each_prompt_alone(name):
    model, ids = double(name), encoded(PROMPTS)
    prefix = shared_prefix(model, ids, longest=99)
    joined, mask = pad(ids, after=prefix.length)
    with torch.inference_mode():
        together = model(
            input_ids=joined[:, prefix.length :],
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1)[:, prefix.length :],
            **{cache_parameter(model): for_rows(prefix.cache, len(ids))},
        ).logits[:, -1]
        alone = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in ids])
    assert torch.allclose(together, alone, atol=1e-10, rtol=0)


def test_a_model_that_was_trained_with_a_loss_of_its_routers_answers_like_others():
    plain, trained = double("mixtral"), double("mixtral")
    trained.config.output_router_logits = True
    answers = generate(trained, tiny_tokenizer(), PROMPTS, max_new_tokens=4)
    assert answers == generate(plain, tiny_tokenizer(), PROMPTS, max_new_tokens=4)


def stretched(kind):
    """A model whose rotary embeddings take other frequencies for texts of more than 64 tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    return tiny_model("llama", rope_parameters=rope)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_of_long_texts_are_turned_as_those_of_each_alone(kind):
    model, ids = stretched(kind), encoded(PROMPTS)
    assert shared_prefix(model, ids, longest=64).length > 8
    assert shared_prefix(model, ids, longest=65) == NO_PREFIX
    assert shared_prefix(stretched("yarn"), ids, longest=65).length > 8


def test_where_a_model_does_not_say_from_which_length_it_turns_otherwise_it_is_from_all_its_positions():
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    most = model.config.max_position_embeddings
    assert shared_prefix(model, encoded(PROMPTS), longest=most).length > 8
    assert shared_prefix(model, encoded(PROMPTS), longest=most + 1) == NO_PREFIX


def test_an_answer_ends_where_the_tokenizer_says_even_if_the_model_goes_on():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    said = tokenizer("Go", add_special_tokens=False)["input_ids"]
    wanted, answers = iter([*said, tokenizer.eos_token_id, *said, *said]), []

    def forced(_module, _inputs, logits):
        logits[..., next(wanted)] = 1e9

    model.lm_head.register_forward_hook(forced)
    options = {"max_new_tokens": 3 * len(said) + 1, "on_batch": lambda _, written: answers.extend(written)}
    assert generate(model, tokenizer, PROMPTS[:1], **options) == ["Go"]
    assert [(answer.text, answer.ids) for answer in answers] == [("Go", tuple(said))]


@pytest.mark.parametrize("ending", ["", "[PAD]"])
def test_a_padding_token_that_the_model_has_no_embedding_for_is_not_read(ending):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"} | ({"eos_token": ending} if ending else {}))
    assert tokenizer.pad_token_id >= len(model.get_input_embeddings().weight)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


def test_the_prefix_is_computed_once_and_not_run_again():
    model = double("llama")
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, options: seen.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=2, batch_size=2)
    lengths = sorted(len(row) for row in encoded(PROMPTS))
    shared = seen[0][1]
    prefills = [shape for shape in seen[1:] if shape[1] > 1]
    assert seen[0][0] == 1
    assert prefills == [(2, lengths[1] - shared), (2, lengths[3] - shared)]


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        (tiny_model("gemma3"), PROMPTS),
        (tiny_model("llama"), PROMPTS[:1]),
        (tiny_model("llama"), []),
        (tiny_model("llama"), ["<|user|>one", "<|user|>two"]),
    ],
    ids=["sliding window", "one prompt", "no prompt", "little in common"],
)
def test_where_nothing_is_shared(model, prompts):
    assert shared_prefix(model, encoded(prompts), longest=99) == NO_PREFIX
    assert len(generate(model, tiny_tokenizer(), prompts, max_new_tokens=2)) == len(prompts)


def test_a_model_with_a_cache_of_its_own_keeps_it():
    model = tiny_model("llama")
    model.generation_config.cache_implementation = "static"
    assert shared_prefix(model, encoded(PROMPTS), longest=99).length == 0


def test_a_cache_that_a_trainer_switched_off_is_used():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    model.generation_config.use_cache = model.config.use_cache = False
    read = []
    model.register_forward_pre_hook(
        lambda _, __, options: read.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=4) == expected
    # After the prompts, of which what they share is read first, one token at a time.
    assert read[0] > 1
    assert read[2:] == [1] * 3


def test_windows_that_only_the_masks_know_of_are_seen():
    for kinds, keeps in ((["global", "local"], False), (["global", "global"], True)):
        sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 16}
        config = GPTNeoConfig(attention_types=[[kinds, 1]], **sizes)
        assert keeps_all(GPTNeoForCausalLM(config)) == keeps


def test_a_prompt_that_is_the_beginning_of_another_keeps_a_token():
    model, tokenizer = double("llama"), tiny_tokenizer()
    prompts = [SHARED, SHARED + "What is the weather?", SHARED]
    ids = encoded(prompts)
    assert shared_prefix(model, ids, longest=99).length == len(ids[0]) - 1
    expected = alone(model, tokenizer, prompts, max_new_tokens=8)
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == expected


def test_draws_repeat_and_leave_the_global_generator_alone():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def draw(prompts=PROMPTS, **options):
        return generate(
            model, tokenizer, prompts, max_new_tokens=12, temperature=1.5, batch_size=2, **options
        )

    before = torch.random.get_rng_state()
    first = draw(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert draw(seed=1) == first
    assert draw(seed=2) != first
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) != first
    # The two longest make the second batch of both calls.
    longest = sorted(range(4), key=lambda i: len(encoded(PROMPTS)[i]))[2:]
    assert draw([PROMPTS[i] for i in longest], seed=1) == [first[i] for i in longest]


def test_batches_shrink_until_they_fit(monkeypatch):
    model, tokenizer = double("llama"), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    original, sizes, seen = model.generate, [], []

    def small_memory(**options):
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 1:
            raise torch.cuda.OutOfMemoryError
        return original(**options)

    monkeypatch.setattr(model, "generate", small_memory)
    answers = generate(
        model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=4, on_batch=lambda i, _: seen.extend(i)
    )
    assert answers == expected
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert sorted(seen) == [0, 1, 2, 3]

    def none(**options):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(model, "generate", none)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        generate(model, tokenizer, PROMPTS, max_new_tokens=4)
