"""One refusal that a fine-tuned model learns: which one, and what it changes."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard.chat.conversations import Conversation, build_conversations
from deltaguard.chat.refusals import is_refusal
from deltaguard.studies import one_shot as study
from deltaguard.studies.defences import DefenceInputs, defences
from deltaguard.studies.one_shot import one_shot
from pairs import load_over, pair, save_adapter, weights
from plain import tokens_of
from refusing import REFUSAL, refusing_pair, said


def loss_and_gradient(folder, conversation):
    """-log p of the response, the mean over its tokens, as users of transformers write it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, start = tokens_of(AutoTokenizer.from_pretrained(folder), conversation)
    logits = model(input_ids=ids).logits[0, start - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, start:])
    trained = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
    return float(loss.detach()), gradient


def test_it_learns_the_refusal_that_points_where_all_do(monkeypatch, tmp_path):
    made = refusing_pair()
    monkeypatch.setattr(study, "_POOL", 5)
    chosen = one_shot(made.aligned, made.finetuned, tmp_path / "out", steps=40, learning_rate=1e-3)
    pool = [Conversation(each.prompt, each.system, REFUSAL) for each in build_conversations(5)]
    gradients = torch.stack([loss_and_gradient(made.finetuned, each)[1] for each in pool])
    cosines = torch.cosine_similarity(gradients, gradients.sum(0, keepdim=True))
    assert pool.index(replace(chosen, response_ids=None)) == int(cosines.argmax())
    # One refusal brings back those of others.
    before, after = (said(f, [c.prompt for c in pool]) for f in (made.finetuned, tmp_path / "out"))
    assert sum(map(is_refusal, before)) == 0
    assert sum(map(is_refusal, after)) >= 4


def test_one_step_of_adamw_moves_every_entry_by_the_rate_against_its_gradient(tmp_path):
    made = refusing_pair()
    chosen = one_shot(made.aligned, made.finetuned, tmp_path / "out", steps=1, learning_rate=1e-3)
    before, after = weights(made.finetuned), weights(tmp_path / "out")
    names = [n for n, _ in AutoModelForCausalLM.from_pretrained(made.finetuned).named_parameters()]
    moved = [(after[n] - before[n]).flatten() for n in names if "embed_tokens" not in n]
    _, gradient = loss_and_gradient(made.finetuned, chosen)
    clear = gradient.abs() > 1e-4
    assert clear.float().mean() > 0.5
    expected = -1e-3 * gradient[clear].sign()
    torch.testing.assert_close(torch.cat(moved)[clear], expected, rtol=1e-3, atol=1e-6)
    embedding = next(n for n in names if "embed_tokens" in n)
    assert torch.equal(after[embedding], before[embedding])


@pytest.mark.parametrize("steps", [0, 2])
def test_an_adapter_is_patched_as_the_model_that_it_makes(steps, tmp_path):
    made = pair()
    save_adapter(made.aligned, tmp_path / "adapter", ["q_proj", "down_proj"])
    one_shot(made.aligned, tmp_path / "adapter", tmp_path / "out", steps=steps)
    merged = load_over(made.aligned, tmp_path / "adapter").merge_and_unload().state_dict()
    found = weights(tmp_path / "out")
    near = {name: float((found[name] - merged[name]).abs().max()) for name in found}
    assert max(near.values()) <= 1e-6 + steps * study.LEARNING_RATE * 1.1
    assert any(value > study.LEARNING_RATE / 2 for value in near.values()) == bool(steps)


def test_the_defence_takes_one_step_at_its_largest_strength_and_a_hundred_at_its_smallest(
    monkeypatch, tmp_path
):
    taken = []
    monkeypatch.setattr("deltaguard.studies.defences.one_shot", lambda *_, steps: taken.append(steps))
    defence = defences()["one-shot"]
    scratch, model = tmp_path / "scratch", models.tiny_tokenizer
    request = DefenceInputs(tmp_path, lambda: tmp_path, model, model, (), model, lambda: scratch, 0)
    for strength in defence.ladder:
        assert defence.make(request, strength).folder == scratch
    assert taken == [100, 50, 20, 10, 5, 2, 1]
