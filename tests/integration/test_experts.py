"""Mixtures of experts: their curvature against plain arithmetic in float64, and restores of them."""

import re
import shutil
from collections import defaultdict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from crossed import in_turn
from deltaguard import CurvatureStore, DeltaguardError, RestoreConfig, restore, verify
from deltaguard.curvature import observe as observe_module
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.contents import spectra_bytes
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.plan import held_curvature, make_plan
from pairs import ANSWERED, CONVERSATIONS, held_out, pair, save_adapter, weights
from plain import most_likely, relative_error, safety_kl, tokens_of

WHOLE = CalibrateConfig(batch_size=4, rank="full")
PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}
MODULE = {"mixtral": ("mlp", "block_sparse_moe")}
"""What the checkpoints of a family call the projections of an expert, and the module around them."""

FORMS = (*models.EXPERTS, "qwen3_moe-stacked")
"""Families, and one in the form that transformers has in memory."""


def save(name, folder, model=None):
    """A checkpoint of a family, or with `-stacked` one of the form that transformers has in memory."""
    family, _, stacked = name.partition("-")
    model = model or models.tiny_model(family)
    if not stacked:
        return models.save(model, folder)
    model.save_pretrained(folder, save_original_format=False)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


def matrices_of(name, stored, prefix, expert):
    """The weights of an expert on disk, (out, in), by what the store calls them; the last is `down_proj`."""
    if name in models.STACKED or name.endswith("-stacked"):
        tensors = {f"{prefix}.experts.{stack}": stack for stack in ("gate_up_proj", "down_proj")}
        found = {f"{tensor}.{expert}": stored[tensor][expert].double() for tensor in tensors}
        return {key: each.T if name in models.STACKED else each for key, each in found.items()}
    projections = PROJECTIONS.get(name, ("gate_proj", "up_proj", "down_proj"))
    names = [f"{prefix}.experts.{expert}.{projection}.weight" for projection in projections]
    return {each: stored[each].double() for each in names}


def gated(name, projected):
    if name != "gpt_oss":
        gate, up = projected.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    gate, up = projected[:, ::2].clamp(max=7), projected[:, 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def plain_experts(name, stored, prefix, seen, hidden, *routing):
    """The experts of a block from their tensors on disk; what each is given and puts out goes into `seen`."""
    made = torch.zeros_like(hidden)
    for expert in range(4):
        if name == "llama4":
            rows = torch.arange(len(hidden)).chunk(4)[expert]
            tokens, weight = rows[hidden[rows].abs().sum(-1) > 0], 1
        else:
            tokens, places = torch.where(routing[0] == expert)
            weight = routing[1][tokens, places, None]
        *first, last = matrices_of(name, stored, prefix, expert).items()
        x, outputs = hidden[tokens], []
        for key, matrix in first:
            outputs.append(x @ matrix.T)
            seen[key] = x, outputs[-1]
        biases = [stored.get(f"{prefix}.experts.{stack}_bias") for stack in ("gate_up_proj", "down_proj")]
        up, down = (0 if bias is None else bias[expert].double() for bias in biases)
        inner = gated(name, torch.cat(outputs, -1) + up)
        found = inner @ last[1].T
        seen[last[0]] = inner, found
        made = made.index_add(0, tokens, (found + down) * weight)
    return made


def plain_sums(name, folder, conversations):
    """Σ x xᵀ, Σ g gᵀ and the number of tokens by weight, in float64, and of all tokens and response tokens.

    Of the experts by what is on disk, of all other linear layers and of routers by their modules.
    """
    how = {"dtype": torch.float64, "experts_implementation": None if name == "llama4" else "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored, seen = load_file(folder / "model.safetensors"), {}
    for path, module in model.model.named_modules(prefix="model"):
        on_disk = path.replace(*MODULE.get(name, ("", "")))
        if path.endswith(".experts"):
            prefix = on_disk.removesuffix(".experts")
            module.forward = partial(plain_experts, name, stored, prefix, seen)
        elif "Router" in type(module).__name__ or isinstance(module, torch.nn.Linear):
            number = 1 if name == "llama4" else 0
            module.register_forward_hook(
                lambda _m, x, y, tensor=f"{on_disk}.weight", number=number: seen.update(
                    {tensor: (x[0], y[number] if isinstance(y, tuple) else y)}
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


def shrunk(sums, tensor):
    """H and the sum for G of an expert's layer, by the rule as docs/how-it-works.md states it."""
    alike = [sums[re.sub(r"\.\d+(?=\.\w+\.weight$|$)", f".{expert}", tensor)] for expert in range(4)]
    pooled_h, pooled_g, pairs = (sum(each[i] for each in alike) for i in range(3))
    own_h, own_g, n = sums[tensor]
    a, b = ((d + 1) / (n + d + 1) for d in map(len, (pooled_h, pooled_g)))
    mean = own_h / n if n else 0 * pooled_h
    return (1 - a) * mean + a * pooled_h / pairs, (1 - b) * own_g + b * pooled_g / 4


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", FORMS)
def test_curvature_is_that_of_an_independent_computation(name, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(observe_module, "drawn_likelihood", most_likely)
    folder = save(name, tmp_path / "model")
    told = []
    config = WHOLE.model_copy(update={"memory": memory})
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config, progress=told.append)
    assert any(event.stage == "backwards" for event in told) == (memory == 0)
    known = {row.prompt for row in store.held_out}
    sums, tokens, responses = plain_sums(name, folder, [c for c in ANSWERED if c.prompt not in known])
    assert {layer.key for group in store.groups for layer in group.layers} == set(sums)
    assert store.provenance.uncovered == ()
    for group in store.groups:
        found, reached = store.sums(group.name), store.reached(group.name)
        for layer, outputs in zip(group.layers, found.outputs, strict=True):
            inputs, gradients, n = sums[layer.key]
            h = inputs / tokens
            assert (reached is not None) == (".experts." in layer.tensor)
            if reached is not None:
                assert reached.tokens == n
                h, gradients = shrunk(sums, layer.key)
            assert relative_error(store.hessian(group.name), h) < 1e-4, layer.key
            assert relative_error(outputs, gradients) < 1e-4, layer.key
            mean = float(gradients.trace()) / len(gradients) / responses
            assert store.output_mean(layer.key) == pytest.approx(mean, rel=1e-4)


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
    stored = [tensor for tensor in weights(made.aligned) if ".experts." in tensor]
    assert [row.name for row in experts] == [tensor for tensor in stored if not tensor.endswith("_bias")]
    assert all(0 < row.kept_energy < 1 and row.safety_cost < 1 for row in experts)


@pytest.mark.parametrize(("name", "strength"), in_turn(models.EXPERTS, [0, 1]))
def test_no_strength_and_all_of_it_are_the_two_models(name, strength, tmp_path):
    made = pair(name)
    config = RestoreConfig(strength=strength, other_params="aligned")
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    expected, out = weights(made.finetuned if strength else made.aligned), weights(tmp_path / "out")
    assert out.keys() == expected.keys()
    for tensor in (each for each in out if ".experts." in each and not each.endswith("_bias")):
        assert torch.equal(out[tensor], expected[tensor]), tensor


def never_reached(expert):
    """A pair of which no token is routed to one expert, and its place in the checkpoint."""
    model = models.tiny_model("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[expert] = -100
    return model, f"model.layers.1.mlp.experts.{expert}"


def test_an_expert_that_no_token_reaches_is_not_free_and_is_listed(tmp_path):
    model, expert = never_reached(2)
    aligned = models.save(model, tmp_path / "aligned")
    finetuned = models.save(models.perturbed(model, 0.05), tmp_path / "finetuned")
    store = calibrate(aligned, tmp_path / "store", conversations=CONVERSATIONS)
    assert store.reached(f"{expert}.gate_proj").tokens == 0
    assert store.reached(f"{expert}.gate_proj").pooled == (1, 1, 1)
    report = restore(aligned, finetuned, tmp_path / "out", store=store, config=RestoreConfig(strength=0.1))
    (rare,) = report.rare_experts
    assert (rare.name, rare.tokens, rare.pooled) == (expert, 0, 1)
    assert any("rarely reach 1 of 4 experts, 1 of them never" in warning for warning in report.warnings)
    assert f"{expert}` | 0 |" in (tmp_path / "out" / "README.md").read_text()
    kept = {row.name: row.kept_energy for row in report.layers if ".experts." in row.name}
    own = [share for name, share in kept.items() if name.startswith(f"{expert}.")]
    others = [share for name, share in kept.items() if not name.startswith(f"{expert}.")]
    assert len(own) == 3
    assert max(own) < max(others)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refine": 2, "max_safety_kl": 1e-3}, "cannot be refined: leave out --refine"),
        ({"output_format": "adapter", "strength": 0.1}, "an adapter cannot hold: write a checkpoint"),
    ],
)
def test_what_cannot_be_done_with_experts_is_refused(options, said, tmp_path):
    made = pair("mixtral")
    with pytest.raises(DeltaguardError, match=rf"mixture of experts \(24 tensors such as .*{said}"):
        restore(
            made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=RestoreConfig(**options)
        )
    assert not (tmp_path / "out").exists()


def test_stores_of_experts_are_not_merged_as_what_is_shrunk_does_not_add_up(tmp_path):
    store = CurvatureStore.from_pretrained(pair("mixtral").whole_store)
    with pytest.raises(DeltaguardError, match=r"does not add up\. Calibrate on all conversations at once"):
        CurvatureStore.merge([store, store], tmp_path / "merged")


@pytest.mark.parametrize("stacked", ["aligned", "finetuned"])
def test_a_pair_of_two_forms_is_refused(stacked, tmp_path):
    for name, seed in (("aligned", 0), ("finetuned", 1)):
        form = "qwen3_moe-stacked" if name == stacked else "qwen3_moe"
        save(form, tmp_path / name, models.tiny_model("qwen3_moe", seed))
    config = RestoreConfig(method="interpolate", strength=0.5)
    with pytest.raises(DeltaguardError, match=r"(?s)not one architecture.*mlp\.experts\."):
        restore(tmp_path / "aligned", tmp_path / "finetuned", tmp_path / "out", config=config)


@pytest.mark.parametrize("method", ["greedy", "published", "ridge", "interpolate"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_every_method_restores_experts(name, method, tmp_path):
    made = pair(name)
    store = {"ridge": made.store, "interpolate": None}.get(method, made.whole_store)
    config = RestoreConfig(method=method, strength=0.5)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=store, config=config)
    kept = [row.kept_energy for row in report.layers if ".experts." in row.name]
    assert kept
    assert all(0 < share < 1.2 for share in kept)
    assert verify(tmp_path / "out").passed


def test_one_matrix_of_a_stack_that_was_not_fine_tuned_stays_as_it_is(tmp_path):
    made = pair("gpt_oss")
    finetuned = shutil.copytree(made.finetuned, tmp_path / "finetuned")
    tensor = "model.layers.0.mlp.experts.gate_up_proj"
    tensors, aligned = weights(finetuned), weights(made.aligned)[tensor]
    tensors[tensor][2] = aligned[2]
    save_file(tensors, finetuned / "model.safetensors", metadata={"format": "pt"})
    restore(made.aligned, finetuned, tmp_path / "out", store=made.store, config=RestoreConfig(strength=0.1))
    out = weights(tmp_path / "out")[tensor]
    assert torch.equal(out[2], aligned[2])
    assert not any(torch.equal(out[i], each[i]) for i in (0, 1, 3) for each in (aligned, tensors[tensor]))


def test_the_memory_planned_holds_the_curvature_of_all_experts_of_a_stack():
    made = pair("gpt_oss")
    store = CurvatureStore.from_pretrained(made.store)
    plan = plan_restore(made.aligned, made.finetuned, store=store, config=RestoreConfig(strength=0.5))
    groups = [group for group in store.groups if ".0.mlp.experts.gate_up_proj" in group.name]
    assert len(groups) == 4
    assert plan.peak_bytes > 3 * sum(spectra_bytes(group, store.provenance.extent) for group in groups)


def test_curvature_that_layers_share_is_held_from_the_first_to_the_last_of_a_shard():
    """A shard may have one projection of all experts before the next one of them."""
    made = pair("mixtral")
    aligned, finetuned = map(Checkpoint.open, (made.aligned, made.finetuned))
    plan = make_plan(aligned, finetuned, store=CurvatureStore.from_pretrained(made.store))
    by_expert = [step for step in plan.steps if ".0.block_sparse_moe.experts." in step.info.name]
    by_projection = sorted(by_expert, key=lambda step: step.info.name.split(".")[-2])
    sizes = {group: 10 for step in by_expert for group in step.groups}
    assert held_curvature(by_expert, sizes) == 20
    assert held_curvature(by_projection, sizes) == 50


def test_an_adapter_over_attention_restores_to_an_adapter(tmp_path):
    made = pair("gpt_oss")
    save_adapter(made.aligned, tmp_path / "tuned", ["q_proj", "o_proj"])
    config = RestoreConfig(strength=0.1, output_format="adapter")
    restore(made.aligned, tmp_path / "tuned", tmp_path / "out", store=made.store, config=config)
    assert verify(tmp_path / "out").passed


def test_a_module_of_experts_that_computes_something_else_is_not_calibrated(tmp_path, monkeypatch):
    model = models.tiny_model("mixtral")
    folder = models.save(model, tmp_path / "model")
    experts = type(model.model.layers[0].mlp.experts)
    real = experts.forward
    monkeypatch.setattr(experts, "forward", lambda self, *given: 2 * real(self, *given))
    with pytest.raises(DeltaguardError, match=r"experts` \(MixtralExperts\) computes something else"):
        calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=WHOLE)
