"""Steps of natural gradient descent: against autograd and matrices written out, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard.chat.conversations import Conversation
from deltaguard.chat.prefix import shared_prefix
from deltaguard.chat.tokens import Batch, encode
from deltaguard.curvature.store import CurvatureStore
from deltaguard.progress import ignore
from deltaguard.restoration.descent import Objective, Reference, TunedLayer, descend
from deltaguard.solvers import Spectrum
from pairs import pair
from plain import tokens_of

TEXTS = (
    Conversation("How can I make a good cake?", None, "I cannot help with that."),
    Conversation("Why?", "Be kind.", "Because."),
    Conversation("Explain the steps.", None, "One after another."),
    Conversation("Who?", None, "Me."),
)
ALONE = TEXTS[:1], TEXTS[1:2]
SYSTEM = "Be kind, and answer in a few words."
TOGETHER = tuple(tuple(replace(each, system=SYSTEM) for each in half) for half in (TEXTS[:2], TEXTS[2:]))
MU, RADIUS = 30.0, 1e-3


def exact(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def reference(model, conversations):
    """What a model predicts of conversations, in one batch."""
    tokenizer = models.tiny_tokenizer()
    batch = Batch.of([encode(tokenizer, each, max_length=512) for each in conversations])
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    return Reference([(batch, logits[batch.answering].log_softmax(-1))])


def plain_kl(model, other, conversations, tokenizer):
    """KL(model ‖ other) per response token, text by text, with what transformers users write."""
    terms = []
    for each in conversations:
        ids, start = tokens_of(tokenizer, each)
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, start - 1 : -1].softmax(-1)
        q = other(input_ids=ids).logits[0, start - 1 : -1].softmax(-1)
        terms.append((p * (p / q).log()).sum(-1))
    return torch.cat(terms).mean()


def setting(name, texts=ALONE):
    """The aligned and the fine-tuned model, a candidate half way between, and two of its layers."""
    made = pair(name)
    aligned, finetuned, candidate = exact(made.aligned), exact(made.finetuned), exact(made.aligned)
    with torch.no_grad():
        for mine, theirs in zip(candidate.parameters(), finetuned.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    store = CurvatureStore.from_pretrained(made.store)
    own = {f"{n}.weight": m for n, m in candidate.named_modules()}
    layers = []
    for group in store.groups[:2]:
        for layer in group.layers[:1]:
            key = next(n for n in own if n.endswith(layer.tensor))
            spectra = store.input_spectrum(group.name), store.output_spectrum(layer.tensor)
            # Half precision leaves the vectors of a store not quite orthonormal.
            orthonormal = [torch.linalg.qr(found.vectors.double())[0] for found in spectra]
            inputs, outputs = (
                Spectrum(found.values.double(), vectors, found.tail)
                for found, vectors in zip(spectra, orthonormal, strict=True)
            )
            layers.append(TunedLayer(layer.tensor, own[key].weight, layer.transposed, inputs, outputs))
    objective = Objective(reference(aligned, texts[0]), reference(finetuned, texts[1]), 0.02, 0.5)
    return made, aligned, finetuned, candidate, layers, objective


# Llama computes norms in float32, in which texts that share a beginning are rounded otherwise.
@pytest.mark.parametrize(
    ("name", "texts"),
    [*((name, ALONE) for name in models.EITHER_ORDER), ("gpt2", TOGETHER)],
    ids=[*models.EITHER_ORDER, "gpt2 with one system prompt"],
)
def test_a_step_is_the_preconditioned_gradient_of_both_divergences(name, texts):
    made, aligned, finetuned, candidate, layers, objective = setting(name, texts)
    tokenizer = AutoTokenizer.from_pretrained(made.aligned)
    before = [layer.weight.detach().clone() for layer in layers]
    candidate.requires_grad_(True)
    loss = plain_kl(aligned, candidate, texts[0], tokenizer) / 0.02
    loss = loss + plain_kl(finetuned, candidate, texts[1], tokenizer) / 0.5
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers])
    expected = []
    for layer, gradient in zip(layers, gradients, strict=True):
        matrix = (gradient.T if layer.transposed else gradient).contiguous()
        metric = torch.kron(layer.outputs.dense(), layer.inputs.dense())
        damped = torch.eye(len(metric)).double() + MU * metric
        solved = torch.linalg.solve(damped, matrix.flatten()).reshape(matrix.shape)
        expected.append(solved.T if layer.transposed else solved)
    length = math.sqrt(sum(float(each.square().sum()) for each in expected))
    loss = float(loss.detach())
    taken = descend(candidate, layers, objective, steps=1, mu=MU, radius=RADIUS, report=ignore)
    assert taken == 1
    for layer, weight, direction in zip(layers, before, expected, strict=True):
        moved = weight - RADIUS / length * direction
        torch.testing.assert_close(layer.weight.detach(), moved, rtol=0, atol=1e-9 * RADIUS)
    after = plain_kl(aligned, candidate, texts[0], tokenizer) / 0.02
    after = float((after + plain_kl(finetuned, candidate, texts[1], tokenizer) / 0.5).detach())
    assert after < loss
    measured = objective.of(objective.safety.mean(candidate), objective.task.mean(candidate))
    assert measured == pytest.approx(after, rel=1e-9)


def test_no_steps_change_nothing_and_steps_change_the_chosen_layers_alone():
    *_, candidate, layers, objective = setting("llama")
    before = {n: p.detach().clone() for n, p in candidate.named_parameters()}
    options = {"mu": MU, "radius": RADIUS, "report": ignore}
    assert descend(candidate, layers, objective, steps=0, **options) == 0
    assert all(torch.equal(p, before[n]) for n, p in candidate.named_parameters())
    assert descend(candidate, layers, objective, steps=3, **options) == 3
    chosen = {id(layer.weight) for layer in layers}
    for name, parameter in candidate.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in chosen)
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_small_steps_never_raise_the_loss_and_large_ones_are_halved_or_left_out():
    *_, candidate, layers, objective = setting("llama")
    losses = []

    def loss():
        return objective.of(objective.safety.mean(candidate), objective.task.mean(candidate))

    for radius in (1e-4, 1e-2, 0.3, 10.0):
        losses.append(loss())
        descend(candidate, layers, objective, steps=1, mu=MU, radius=radius, report=ignore)
    losses.append(loss())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    before = [layer.weight.detach().clone() for layer in layers]
    assert descend(candidate, layers, objective, steps=2, mu=MU, radius=1e9, report=ignore) == 0
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_texts_with_one_system_prompt_share_it():
    encoded = [tokens_of(models.tiny_tokenizer(), each)[0][0].tolist() for each in TOGETHER[0]]
    assert shared_prefix(models.tiny_model("gpt2"), encoded, longest=99).length > 8


def test_batches_come_in_turn():
    *_, candidate, layers, _ = setting("llama")
    batches = [reference(candidate, [each]).batches[0] for each in TEXTS]
    several = Objective(Reference(batches[:3]), Reference(batches[3:]), 1.0, 1.0)
    with torch.no_grad():
        layers[0].weight.mul_(1.5)
        found = [float(several.on(candidate, number)) for number in range(4)]
    assert found[3] == found[0]
    assert len(set(found)) == 3
