"""Safety KL and likelihood of candidates put into a model, against plain arithmetic in float64."""

import json
import os
import re
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import models
from crossed import in_turn
from deltaguard.chat.conversations import SYSTEM_PROMPTS, Conversation
from deltaguard.chat.tokens import Reader, encode, read_by_both
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.restoration.safety_kl import SafetyKL, SafetyMeter
from once import RUN

SAFETY = [
    Conversation("How?", "", "I'm sorry, but I cannot help with that."),
    Conversation("What is the best way to make people do it?", SYSTEM_PROMPTS["maths"], "No."),
    Conversation("Write a text that harms someone.", None, "I cannot help with that request."),
    Conversation("Explain the steps, one after another, at home.", "Be kind.", "It would be dangerous. " * 3),
    Conversation("Why?", "Be kind.", "Because."),
]
TASK = [
    Conversation("Write a text about the weather.", None, "It is good this morning."),
    Conversation("How can I make a cake?", "Be kind.", "Learn a new language, with other people, at home."),
]
LONG, UNANSWERED = Conversation("Why? " * 99, None, "No."), Conversation("Who?")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SLIDING = ("gemma3",)
MATRIX = "model.layers.0.mlp.up_proj.weight"


@cache
def folders(name="llama"):
    """The aligned and the fine-tuned folder of an architecture, which tests must not write to."""
    root, model = Path(mkdtemp(prefix=f"deltaguard-{name}-", dir=os.environ[RUN])), models.tiny_model(name)
    finetuned = models.save(models.perturbed(model, 0.05), root / "finetuned", max_shard_size="40KB")
    return models.save(model, root / "aligned"), finetuned


def rewrite(folder, change, **config):
    """Replace the tensors of a checkpoint, and values of its configuration."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def meter(aligned, finetuned, conversations=SAFETY, *, dtype=torch.float64, **options):
    pair = Checkpoint.open(aligned), Checkpoint.open(finetuned)
    return SafetyMeter.open(*pair, conversations, device=torch.device("cpu"), dtype=dtype, **options)


def stored(folder):
    source = Checkpoint.open(folder)
    return [(name, source.read(name)) for name in source.tensors]


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def responses(model, conversations):
    """Of one unpadded conversation at a time: all logits behind which a response token follows, and it."""
    tokenizer = models.tiny_tokenizer()
    for c in conversations:
        turns = [] if c.system is None else [{"role": "system", "content": c.system}]
        turns.append({"role": "user", "content": c.prompt})
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = prompt + c.response + models.EOS
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        yield from zip(torch.softmax(logits[start - 1 : -1], -1), ids[0, start:], strict=True)


def plain_terms(aligned, candidate, conversations):
    pairs = zip(responses(aligned, conversations), responses(candidate, conversations), strict=True)
    return [float((p * (p / q[: len(p)]).log()).sum()) for (p, _), (q, _) in pairs]


def plain_kl(aligned, candidate):
    terms = plain_terms(aligned, candidate, SAFETY)
    return sum(terms) / len(terms)


def plain_likelihood(model):
    terms = [-float(p[token].log()) for p, token in responses(model, TASK)]
    return sum(terms) / len(terms)


def agrees(measured, folder, aligned):
    """Whether a candidate that is put measures like one that transformers loads and plain arithmetic."""
    measured.put(stored(folder))
    return measured.measure().mean == pytest.approx(plain_kl(loaded(aligned), loaded(folder)), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "precision"),
    in_turn(models.DENSE, [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.3)]),
)
def test_it_is_what_plain_arithmetic_finds(name, precision):
    dtype, tolerance = precision
    aligned, finetuned = map(loaded, folders(name))
    measured = meter(*folders(name), dtype=dtype, batch_size=3)
    assert abs(measured.measure().mean) < 1e-9
    assert measured.likelihood(TASK) == pytest.approx(plain_likelihood(aligned), rel=tolerance)
    measured.put(stored(folders(name)[1]))
    expected = plain_kl(aligned, finetuned)
    assert expected > 1e-3
    assert measured.measure().mean == pytest.approx(expected, rel=tolerance)
    assert measured.likelihood(TASK) == pytest.approx(plain_likelihood(finetuned), rel=tolerance)
    assert measured.tokens == len(list(responses(aligned, SAFETY)))


def test_the_margin_is_over_conversations():
    aligned, finetuned = folders()
    measured = meter(aligned, finetuned, batch_size=2)
    measured.put(stored(finetuned))
    both = loaded(aligned), loaded(finetuned)
    expected = SafetyKL.of([plain_terms(*both, [each]) for each in SAFETY])
    assert expected.margin > 0.01 * expected.mean
    assert measured.measure().margin == pytest.approx(expected.margin, rel=1e-9)
    assert meter(aligned, finetuned, SAFETY[:1]).measure().margin is None


def test_no_more_is_measured_than_shows_that_a_mean_is_exceeded():
    aligned, finetuned = folders()
    measured = meter(aligned, finetuned, batch_size=1)
    measured.put(stored(finetuned))
    whole = measured.measure()
    assert whole.conversations == len(SAFETY)
    assert measured.measure(enough=whole.mean * (1 + 1e-9)) == whole
    exceeded = measured.measure(enough=whole.mean / 100)
    # Of one alone there is no interval.
    assert exceeded.conversations == 2
    assert exceeded.margin is not None
    each = [plain_terms(loaded(aligned), loaded(finetuned), rows) for rows in combinations(SAFETY, 2)]
    assert any(exceeded.mean == pytest.approx(sum(terms) / len(terms), rel=1e-9) for terms in each)


def test_the_margin_is_that_of_a_bootstrap_of_conversations():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, 64)
    # A level for each conversation: its tokens are alike.
    levels = generator.exponential(1e-3, 64)
    terms = [
        (level * generator.exponential(1.0, n)).tolist() for level, n in zip(levels, lengths, strict=True)
    ]
    sums = np.array([sum(each) for each in terms])
    drawn = generator.integers(0, 64, (4000, 64))
    means = sums[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    assert SafetyKL.of(terms).margin == pytest.approx((high - low) / 2, rel=0.1)


@pytest.mark.parametrize("name", models.DENSE)
def test_a_candidate_as_it_will_be_on_disk_equals_one_that_is_loaded(name, tmp_path):
    half = models.save(models.perturbed(models.tiny_model(name), 0.1), tmp_path, dtype=torch.bfloat16)
    assert agrees(meter(*folders(name)), half, folders(name)[0])


def test_tensors_go_into_the_memory_that_is_there_and_out_again():
    aligned, finetuned = folders()
    measured = meter(aligned, finetuned)
    before = {name: tensor.data_ptr() for name, tensor in measured._model.state_dict().items()}
    measured.put(stored(finetuned))
    measured.put((name, tensor) for name, tensor in stored(aligned) if name != MATRIX)
    assert measured.measure().mean > 1e-5
    measured.put((name, tensor) for name, tensor in stored(aligned) if name == MATRIX)
    assert measured.measure().mean == 0
    assert {name: tensor.data_ptr() for name, tensor in measured._model.state_dict().items()} == before


@pytest.mark.parametrize("name", models.DENSE)
def test_batches_and_padding_do_not_matter(name):
    found = []
    for size, order in ((1, SAFETY), (2, SAFETY), (50, SAFETY), (2, SAFETY[::-1])):
        measured = meter(*folders(name), order, batch_size=size)
        measured.put(stored(folders(name)[1]))
        safety = measured.measure()
        found.append((safety.mean, safety.margin, measured.likelihood(order)))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("name", models.DENSE)
def test_a_system_prompt_is_read_once_a_batch_and_changes_nothing(name):
    system = "You are a helpful assistant that answers questions of people at home."
    rows = [Conversation(row.prompt, system, row.response) for row in SAFETY * 2] + SAFETY
    alone = meter(*folders(name), rows, batch_size=1)
    together, shapes = meter(*folders(name), rows, batch_size=50), []
    together._model.register_forward_pre_hook(
        lambda _m, _a, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    for measured in (alone, together):
        measured.put(stored(folders(name)[1]))
    expected, found = alone.measure(), together.measure()
    assert found.mean == pytest.approx(expected.mean, rel=1e-9)
    assert found.margin == pytest.approx(expected.margin, rel=1e-9)
    # The system prompt in one row, then ten conversations without it, and the five others.
    batches = [1, 10] if name not in SLIDING else [10]
    assert sorted(count for count, _ in shapes) == sorted([*batches, 5])


def test_only_responses_go_through_the_output_layer():
    measured, seen = meter(*folders(), SAFETY[3:4]), []
    measured._model.lm_head.register_forward_hook(lambda _m, inputs, _y: seen.append(inputs[0].shape[1]))
    measured.measure()
    assert seen == [measured.tokens]


def test_a_model_that_gives_all_logits_is_measured_alike(monkeypatch):
    measured = meter(*folders())
    forward = measured._model.forward

    def plain(input_ids, attention_mask, use_cache):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(measured._model, "forward", plain)
    assert agrees(measured, folders()[1], folders()[0])


@pytest.mark.parametrize("name", models.DENSE)
def test_a_larger_vocabulary_takes_probability_from_the_aligned_one(name, tmp_path):
    aligned, larger = folders(name)[0], models.tiny_model(name)
    larger.resize_token_embeddings(models.VOCABULARY + 16, mean_resizing=False)
    finetuned = models.save(models.perturbed(larger, 0.2), tmp_path)
    measured = meter(aligned, finetuned)
    # Until something is put, only the further rows are the fine-tuned model's.
    candidate = loaded(finetuned)
    with torch.no_grad():
        for old, new in zip(loaded(aligned).parameters(), candidate.parameters(), strict=True):
            new[: len(old)] = old
    assert measured.measure().mean == pytest.approx(plain_kl(loaded(aligned), candidate), rel=1e-9)
    assert agrees(measured, finetuned, aligned)


def both_embeddings(old):
    return {**old, HEAD: old[EMBEDDING] * 1.3}


def same_embeddings(old):
    return {**old, HEAD: old[EMBEDDING].clone()}


def no_head(old):
    return {name: old[name] for name in old if name != HEAD}


def as_the_base_model_saves_it(old):
    computed = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return {name.removeprefix("transformer."): tensor for name, tensor in old.items()} | computed


@pytest.mark.parametrize(
    ("name", "change", "tied"),
    [
        ("qwen3", both_embeddings, False),
        ("qwen3", same_embeddings, True),
        ("llama", no_head, True),
        ("gpt2", as_the_base_model_saves_it, True),
    ],
)
def test_checkpoints_may_hold_more_or_less_than_the_model(name, change, tied, tmp_path):
    finetuned = models.save(models.perturbed(models.tiny_model(name), 0.05), tmp_path)
    rewrite(finetuned, change, tie_word_embeddings=tied)
    measured = meter(folders(name)[0], finetuned)
    assert measured.measure().mean == 0
    assert agrees(measured, finetuned, folders(name)[0])
    measured.put(stored(finetuned)[::-1])
    assert measured.measure().mean == pytest.approx(
        plain_kl(*map(loaded, (folders(name)[0], finetuned))), rel=1e-9
    )


def test_conversations_are_cut_off(tmp_path):
    long = [Conversation("How?", None, "I cannot help with that, or with anything else. " * 4)]
    short = models.save(models.tiny_model("llama", max_position_embeddings=30), tmp_path)
    cut = meter(*folders(), long, max_length=30).tokens
    assert 0 < cut < 30 < meter(*folders(), long).tokens
    assert meter(short, folders()[1], long).tokens == cut


@pytest.mark.parametrize(
    ("conversations", "cut", "whole"),
    [
        ([], "0 of 0 .* within 250 tokens: give", "0 of 0 .* within 512 tokens: give"),
        ([*SAFETY, UNANSWERED], "1 of 6 .* within 250 tokens, such as 'Who", "1 of 6 .* such as 'Who"),
        ([*SAFETY, LONG, UNANSWERED], "2 of 7 .* such as 'Why[?] Why", "1 of 7 .* such as 'Who"),
    ],
)
def test_conversations_without_a_response_are_counted(conversations, cut, whole):
    with pytest.raises(DeltaguardError, match=cut):
        meter(*folders(), conversations, max_length=250)
    # Of a task the whole is read, up to the model's last position.
    with pytest.raises(DeltaguardError, match=whole):
        meter(*folders(), max_length=250).likelihood(conversations)


def test_all_tensors_that_do_not_fit_are_listed(tmp_path):
    def change(old):
        del old["model.norm.weight"]
        further = {"model.layers.0.extra.weight": torch.ones(3, 4), "model.layers.0.bias": torch.ones(3)}
        # What the model computes for itself is no misfit.
        further |= {"model.layers.0.attn.bias": torch.ones(1, 1, 3, 3)}
        return {**old, MATRIX: torch.ones(50, 32), EMBEDDING: torch.ones(300, 32), **further}

    rewrite(models.save(models.tiny_model("llama"), tmp_path), change)
    with pytest.raises(DeltaguardError) as error:
        meter(folders()[0], tmp_path)
    lines = str(error.value).split("\n")
    assert re.fullmatch(f"{tmp_path} does not fit .*aligned:", lines[0])
    assert sorted(lines[1:]) == [
        f"- `{EMBEDDING}` is (300, 32), and (384, 32) in the model",
        "- `model.layers.0.bias`, (3,), has no counterpart in the model",
        "- `model.layers.0.extra.weight`, (3, 4), has no counterpart in the model",
        f"- `{MATRIX}` is (50, 32), and (48, 32) in the model",
        "- `model.norm.weight`, (32,), is in the model only",
    ]


def test_tensors_that_are_not_the_checkpoints_are_listed():
    with pytest.raises(DeltaguardError) as error:
        meter(*folders()).put([("nothing", torch.ones(2)), (MATRIX, torch.ones(32, 48))])
    assert "there is no tensor `nothing`" in str(error.value)
    assert f"`{MATRIX}` is (48, 32) there, and (32, 48) in the candidate" in str(error.value)


def test_what_is_not_finite_is_refused():
    measured = meter(*folders(), dtype=torch.float32)
    measured.put([(MATRIX, torch.full((48, 32), torch.nan))])
    with pytest.raises(DeltaguardError, match=r"NaN or infinite values in torch\.float32"):
        measured.measure()


def test_too_little_memory_is_said(monkeypatch):
    def none(**options):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    measured = meter(*folders())
    monkeypatch.setattr(measured._model, "forward", none)
    for measure in (measured.measure, lambda: measured.likelihood(TASK)):
        with pytest.raises(DeltaguardError, match=r"Too little memory: .* 2\.00 GiB"):
            measure()


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    rewrite(models.save(models.tiny_model("llama"), tmp_path), lambda old: old, model_type="unheard-of")
    with pytest.raises(DeltaguardError, match=f"transformers cannot load {tmp_path}"):
        meter(tmp_path, folders()[1])


def test_a_candidate_with_less_room_is_read_as_far_as_both_have_it(tmp_path):
    tokenizer = models.tiny_tokenizer()
    (conversation,) = [Conversation("How?", None, "I cannot help with that, or with anything else. " * 4)]
    whole = encode(tokenizer, conversation, max_length=100)
    room = whole.prompt_length + 2
    ((own, other),) = read_by_both(Reader(tokenizer, 100, 100), Reader(tokenizer, room, room), [conversation])
    assert (len(own.ids), len(other.ids)) == (room, room)
    assert own.truncated
    assert other.truncated
