"""Mixtures of experts: their curvature against plain arithmetic in float64, and restores of them."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard import RestoreConfig, restore, verify
from deltaguard.curvature import observe as observe_module
from deltaguard.curvature.calibrate import CalibrateConfig, calibrate
from pairs import ANSWERED, held_out, pair, weights
from plain import most_likely, relative_error, safety_kl, tokens_of

WHOLE = CalibrateConfig(batch_size=4, rank="full")
PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}
MODULE = {"mixtral": "block_sparse_moe"}
"""What the checkpoints of a family call the projections of an expert, and the module around them."""


def plain_experts(stored, prefix, projections, seen, hidden, chosen, weight):
    """The experts of a block from their tensors on disk; what each is given and puts out goes into `seen`."""
    made = torch.zeros_like(hidden)
    for expert in range(4):
        tokens, places = torch.where(chosen == expert)
        names = [f"{prefix}.experts.{expert}.{projection}.weight" for projection in projections]
        gate, up, down = (stored[name].double() for name in names)
        x = hidden[tokens]
        gated, raised = x @ gate.T, x @ up.T
        inner = torch.nn.functional.silu(gated) * raised
        found = inner @ down.T
        for name, given, put_out in zip(names, (x, x, inner), (gated, raised, found), strict=True):
            seen[name] = given, put_out
        made = made.index_add(0, tokens, found * weight[tokens, places, None])
    return made


def plain_sums(name, folder, conversations):
    """Σ x xᵀ, Σ g gᵀ and the number of tokens by tensor, in float64, and of all tokens and response tokens.

    Of the experts by what is on disk, of all other linear layers and of routers by their modules.
    """
    how = {"dtype": torch.float64, "experts_implementation": "eager"}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, **how),
        AutoTokenizer.from_pretrained(folder),
    )
    stored, seen, rename = load_file(folder / "model.safetensors"), {}, MODULE.get(name, "mlp")
    for path, module in model.model.named_modules(prefix="model"):
        on_disk = path.replace("mlp", rename) if path.endswith("mlp.gate") else path
        if path.endswith("mlp.experts"):
            prefix = path.removesuffix(".experts").replace("mlp", rename)
            parts = PROJECTIONS.get(name, ("gate_proj", "up_proj", "down_proj"))
            module.forward = partial(plain_experts, stored, prefix, parts, seen)
        elif path.endswith("mlp.gate") or isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _m, x, y, tensor=f"{on_disk}.weight": seen.update(
                    {tensor: (x[0], y[0] if isinstance(y, tuple) else y)}
                )
            )
    sums, tokens, responses = defaultdict(lambda: [0, 0, 0]), 0, 0
    for conversation in conversations:
        ids, start = tokens_of(tokenizer, conversation)
        scores = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        gradients = torch.autograd.grad(scores.amax(-1).sum(), [y for _, y in seen.values()])
        for (tensor, (given, _)), gradient in zip(seen.items(), gradients, strict=True):
            x, g = given.detach().flatten(0, -2), gradient.flatten(0, -2)
            parts = (x.T @ x, g.T @ g, len(x))
            sums[tensor] = [total + part for total, part in zip(sums[tensor], parts, strict=True)]
        tokens, responses = tokens + ids.shape[1], responses + len(scores)
    return sums, tokens, responses


def effective_rank(matrix):
    values = torch.linalg.eigvalsh(matrix)
    return float(values.sum() ** 2 / values.square().sum())


def shrunk(sums, tensor):
    """H and the sum for G of an expert's layer, by the rule as docs/how-it-works.md states it."""
    before, after = tensor.split(".experts.")
    alike = [sums[f"{before}.experts.{expert}.{after.split('.', 1)[1]}"] for expert in range(4)]
    pooled_h, pooled_g, pairs = (sum(each[i] for each in alike) for i in range(3))
    own_h, own_g, n = sums[tensor]
    a, b = ((r + 1) / (n + r + 1) for r in map(effective_rank, (pooled_h, pooled_g)))
    mean = own_h / n if n else 0 * pooled_h
    return (1 - a) * mean + a * pooled_h / pairs, (1 - b) * own_g + b * pooled_g / 4


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", models.EXPERTS)
def test_curvature_is_that_of_an_independent_computation(name, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(observe_module, "drawn_likelihood", most_likely)
    monkeypatch.setattr("deltaguard.curvature.passes.drawn_likelihood", most_likely)
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    told = []
    config = WHOLE.model_copy(update={"memory": memory})
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config, progress=told.append)
    assert any(event.stage == "backwards" for event in told) == (memory == 0)
    known = {row.prompt for row in store.held_out}
    sums, tokens, responses = plain_sums(name, folder, [c for c in ANSWERED if c.prompt not in known])
    assert {layer.tensor for group in store.groups for layer in group.layers} == set(sums)
    assert store.provenance.uncovered == ()
    for group in store.groups:
        found, reached = store.sums(group.name), store.reached(group.name)
        for layer, outputs in zip(group.layers, found.outputs, strict=True):
            inputs, gradients, n = sums[layer.tensor]
            h = inputs / tokens
            assert (reached is not None) == (".experts." in layer.tensor)
            if reached is not None:
                assert reached.tokens == n
                h, gradients = shrunk(sums, layer.tensor)
            assert relative_error(store.hessian(group.name), h) < 1e-4, layer.tensor
            assert relative_error(outputs, gradients) < 1e-4, layer.tensor
            mean = float(gradients.trace()) / len(gradients) / responses
            assert store.output_mean(layer.tensor) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("name", models.EXPERTS)
def test_a_restored_mixture_is_as_measured_and_loads(name, tmp_path):
    made = pair(name)
    config = RestoreConfig(max_safety_kl=1e-3)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    assert verify(tmp_path / "out").passed
    found = safety_kl(made.aligned, tmp_path / "out", held_out(made.store))
    assert report.dial.restored_kl == pytest.approx(found, rel=1e-3)
    assert 0 < found <= 1e-3 < report.dial.finetuned_kl
    assert 0.2 < report.kept_energy < 1
    experts = [row for row in report.layers if ".experts." in row.name]
    assert len(experts) == sum(".experts." in tensor for tensor in weights(made.aligned))
    assert all(0 < row.kept_energy < 1 and row.safety_cost < 1 for row in experts)


@pytest.mark.parametrize("strength", [0, 1])
@pytest.mark.parametrize("name", models.EXPERTS)
def test_no_strength_and_all_of_it_are_the_two_models(name, strength, tmp_path):
    made = pair(name)
    config = RestoreConfig(strength=strength, other_params="aligned")
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    expected, out = weights(made.finetuned if strength else made.aligned), weights(tmp_path / "out")
    assert out.keys() == expected.keys()
    for tensor in (each for each in out if ".experts." in each):
        assert torch.equal(out[tensor], expected[tensor]), tensor
