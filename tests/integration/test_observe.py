"""What calibration sums over inputs and gradients, against plain arithmetic in float64, text by text."""

import gc

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import models
from deltaguard.chat.tokens import Encoded, batches
from deltaguard.curvature import observe as observe_module
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.groups import observe
from deltaguard.curvature.observe import Accumulator, drawn_likelihood
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.routed import take_sums
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.sums import LayerGroup
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.solvers import spectrum
from pairs import ANSWERED, pair
from plain import most_likely, relative_error, tokens_of

WHOLE = CalibrateConfig(batch_size=4, rank="full")
HEADS = ("lm_head.weight", "embed_out.weight")
QKV, MLP = "self_attn.{q,k,v}_proj", "mlp.{gate,up}_proj"
SHARED = {
    "llama": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "qwen3": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "mistral": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "gemma3": (QKV, "self_attn.o_proj", MLP, "mlp.down_proj"),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": (
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    "opt": (QKV, "self_attn.out_proj", "fc1", "fc2"),
}


def unfolded(pattern):
    """`a.{q,k}_proj` as `a.q_proj` and `a.k_proj`."""
    if "{" not in pattern:
        return frozenset({pattern})
    before, rest = pattern.split("{")
    names, after = rest.split("}")
    return frozenset(before + name + after for name in names.split(","))


def plain_curvature(folder, conversations, labels=None):
    """H and G of every linear layer by tensor, in float64, one unpadded conversation at a time.

    `labels` are the drawn tokens of each conversation; the most likely ones where absent.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    seen, sums, tokens, responses = {}, {}, 0, 0
    for name, module in linear.items():
        module.register_forward_hook(lambda _m, x, y, name=name: seen.update({name: (x[0], y)}))
    for number, conversation in enumerate(conversations):
        ids, start = tokens_of(tokenizer, conversation)
        scores = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        drawn = scores.argmax(-1) if labels is None else labels[number]
        likelihood = scores.gather(-1, drawn.reshape(-1, 1)).sum()
        gradients = torch.autograd.grad(likelihood, [output for _, output in seen.values()])
        for (name, (x, _)), g in zip(seen.items(), gradients, strict=True):
            for key, vectors in (("H", x.detach().flatten(0, -2)), ("G", g.flatten(0, -2))):
                sums[name, key] = sums.get((name, key), 0) + vectors.T @ vectors
        tokens, responses = tokens + ids.shape[1], responses + len(scores)
    return {f"{n}.weight": (sums[n, "H"] / tokens, sums[n, "G"] / responses) for n in linear}


def used(store):
    """The conversations that were not held out."""
    prompts = {row.prompt for row in store.held_out}
    return [conversation for conversation in ANSWERED if conversation.prompt not in prompts]


def output_curvature(store, tensor):
    group = store.group_of(tensor)
    number = [layer.tensor for layer in group.layers].index(tensor)
    return store.sums(group.name).outputs[number] / store.provenance.response_tokens


@pytest.mark.parametrize("name", models.DENSE)
def test_curvature_is_that_of_an_independent_computation(name, tmp_path, monkeypatch):
    monkeypatch.setattr(observe_module, "drawn_likelihood", most_likely)
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=WHOLE)
    expected = plain_curvature(folder, used(store))
    for head in HEADS:
        expected.pop(head, None)
    assert {layer.tensor for group in store.groups for layer in group.layers} == set(expected)
    assert store.provenance.uncovered == ()
    for tensor, (h, g) in expected.items():
        group = store.group_of(tensor)
        assert relative_error(store.hessian(group.name), h) < 1e-4, tensor
        assert relative_error(output_curvature(store, tensor), g) < 1e-4, tensor
        priced = (store.input_spectrum(group.name), h), (store.output_spectrum(tensor), g)
        for found, matrix in priced:
            assert relative_error(found.dense(), spectrum(matrix).floored().dense()) < 1e-4, tensor
        assert store.output_mean(tensor) == pytest.approx(float(g.trace()) / len(g), rel=1e-4)


@pytest.mark.parametrize("name", models.DENSE)
def test_layers_that_see_the_same_input_are_one_group(name):
    folder, store = pair(name).aligned, CurvatureStore.from_pretrained(pair(name).store)
    block = [
        frozenset(layer.tensor.split(".1.")[1].removesuffix(".weight") for layer in group.layers)
        for group in store.groups
        if ".1." in group.name
    ]
    assert block == [unfolded(pattern) for pattern in SHARED[name]]
    assert {layer.transposed for group in store.groups for layer in group.layers} == {
        name in models.STORED_IN_OUT
    }
    weights = load_file(folder / "model.safetensors")
    for group in store.groups:
        assert group.name == group.layers[0].tensor.removesuffix(".weight")
        for layer in group.layers:
            shape = weights[layer.tensor].shape
            expected = (group.in_features, layer.out_features)
            assert tuple(shape if name in models.STORED_IN_OUT else shape[::-1]) == expected


@pytest.mark.parametrize("name", models.DENSE)
def test_batching_and_padding_do_not_matter(name, tmp_path, monkeypatch):
    monkeypatch.setattr(observe_module, "drawn_likelihood", most_likely)
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    one, eight = (
        calibrate(
            folder,
            tmp_path / f"store-{size}",
            conversations=ANSWERED,
            config=WHOLE.model_copy(update={"batch_size": size}),
        )
        for size in (1, 8)
    )
    assert one.provenance.tokens == eight.provenance.tokens == one.groups[0].tokens
    for group in one.groups:
        a, b = one.sums(group.name), eight.sums(group.name)
        assert relative_error(a.inputs.total, b.inputs.total.double()) < 1e-4, group.name
        for layer, x, y in zip(group.layers, a.outputs, b.outputs, strict=True):
            assert relative_error(x, y.double()) < 1e-4, layer.name


@pytest.mark.parametrize("name", models.EITHER_ORDER)
def test_tokens_are_drawn_from_the_model_anew_for_each_conversation(name, tmp_path, monkeypatch):
    drawn = []

    def spied(logits, *, seed):
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.multinomial(logits.log_softmax(-1).exp(), 1, generator=generator)[:, 0])
        return drawn_likelihood(logits, seed=seed)

    monkeypatch.setattr(observe_module, "drawn_likelihood", spied)
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    config = WHOLE.model_copy(update={"batch_size": 2})
    store = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config)
    tokenizer = models.tiny_tokenizer()
    longest = sorted(used(store), key=lambda c: -tokens_of(tokenizer, c)[0].numel())
    lengths = [ids.shape[1] - start for ids, start in (tokens_of(tokenizer, c) for c in longest)]
    assert [len(each) for each in drawn] == lengths
    for tensor, (_, g) in plain_curvature(folder, longest, drawn).items():
        if tensor not in HEADS:
            assert relative_error(output_curvature(store, tensor), g) < 1e-4, tensor


def test_a_draw_depends_on_its_seed_alone():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    first = drawn_likelihood(logits, seed=3)
    torch.rand(5)
    assert torch.equal(drawn_likelihood(logits, seed=3), first)
    assert not torch.equal(drawn_likelihood(logits, seed=4), first)


# The accumulator by itself


def accumulator(tmp_path, model):
    """One over all layers of a model that was saved and loaded again, as calibration does."""
    source = Checkpoint.open(models.save(model, tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(source.folder).eval().requires_grad_(requires_grad=False)
    observed, _ = observe(loaded, source, [5, 6, 7])
    return Accumulator(loaded, observed), loaded, observed


def text(length, prompt_length, first=5):
    return Encoded(tuple(range(first, first + length)), prompt_length, truncated=False)


def graphs():
    """How many tensors there are that remember where they come from."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum(tensor.grad_fn is not None for tensor in found)


def test_nothing_of_a_batch_is_kept_but_its_sums(tmp_path):
    adder, model, _ = accumulator(tmp_path, models.tiny_model("llama"))
    before = graphs()
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    for number, batch in enumerate(batches([text(9, 4), text(6, 3)], 1)):
        adder.add(number, batch)
        assert graphs() == before
        totals = [running.taken().total for running in adder.sums.values()]
        assert all(total.grad_fn is None and not total.requires_grad for total in totals)
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert not any(registered for pair in hooks for registered in pair)
    assert {running.taken().tokens for running in adder.sums.values()} == {15}


def test_the_sums_of_a_group_are_given_up_when_they_are_taken(tmp_path):
    adder, _, observed = accumulator(tmp_path, models.tiny_model("gpt2"))
    (batch,) = batches([text(9, 4), text(6, 3)], 2)
    adder.add(0, batch)
    for group in observed:
        sums = take_sums(LayerGroup(group.name, group.in_features, 15, group.layers), adder.sums)
        assert len(sums.outputs) == len(group.layers)
        assert sums.inputs.tokens == 15
    assert adder.sums == {}


@pytest.mark.parametrize("name", models.EITHER_ORDER)
def test_a_batch_without_a_response_adds_its_inputs_and_no_gradient(name, tmp_path):
    adder, _, _ = accumulator(tmp_path, models.tiny_model(name))
    (batch,) = batches([text(6, 6), text(4, 4)], 2)
    assert not batch.answering.any()
    adder.add(0, batch)
    for sum_name, running in adder.sums.items():
        assert bool(running.taken().total.any()) == sum_name.endswith(".input"), sum_name


def test_the_mean_over_draws_is_the_fisher_information_of_the_output(tmp_path):
    """E[Σ g gᵀ] = Σ Jᵀ (diag p - p pᵀ) J over tokens, J being the logits' derivative by a layer's output."""
    tiny = models.tiny_model("llama", vocab_size=24, hidden_size=8, intermediate_size=6, num_hidden_layers=1)
    adder, model, observed = accumulator(tmp_path, tiny)
    (batch,) = batches([text(5, 4)], 1)
    assert int(batch.answering.sum()) == 1
    draws = 1500
    for number in range(draws):
        adder.add(number, batch)
    layers = [pair for group in observed for pair in zip(group.layers, group.modules, strict=True)]
    for layer, module in layers:
        expected = fisher_information(model, module, batch)
        found = adder.sums[f"{layer.name}.output"].taken().total / draws
        assert relative_error(found, expected) < 0.1, layer.name
        assert float(found.trace()) == pytest.approx(float(expected.trace()), rel=0.06), layer.name


def fisher_information(model, module, batch):
    seen = []
    handles = [
        model.get_input_embeddings().register_forward_hook(lambda _m, _x, y: y.requires_grad_()),
        module.register_forward_hook(lambda _m, _x, y: seen.append(y)),
    ]
    logits = model(input_ids=batch.ids).logits[batch.answering][0]
    for handle in handles:
        handle.remove()
    jacobian = torch.stack(
        [torch.autograd.grad(logit, seen[0], retain_graph=True)[0][0] for logit in logits]
    ).double()
    p = logits.detach().double().softmax(-1)
    spread = p.diag() - torch.outer(p, p)
    return sum(j.T @ spread @ j for j in jacobian.unbind(1))


def test_a_model_that_overflows_is_said_to(tmp_path):
    model = models.tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    folder = models.save(model, tmp_path / "model", dtype=torch.bfloat16)
    config = WHOLE.model_copy(update={"dtype": "float16"})
    with pytest.raises(
        DeltaguardError, match=r"NaN or infinite values in torch.float16.*Calibrate in float32"
    ):
        calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config)


# Layers that are not as they should be


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("llama"))


def test_weights_that_differ_from_the_checkpoint_are_all_listed(llama):
    other = models.perturbed(models.tiny_model("llama"), 0.01)
    with pytest.raises(DeltaguardError) as caught:
        observe(other, Checkpoint.open(llama), [5, 6, 7])
    assert str(caught.value).count("differs from the model's") == 14


def test_matrices_that_no_text_reaches_are_named(llama):
    model = models.tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.register_module("unused", torch.nn.Linear(4, 4, bias=False))
    attention.register_parameter("table", torch.nn.Parameter(torch.zeros(2, 2)))
    _, uncovered = observe(model, Checkpoint.open(llama), [5, 6, 7])
    assert uncovered == ("model.layers.0.self_attn.table", "model.layers.0.self_attn.unused.weight")


def test_a_layer_that_is_used_twice_is_refused(llama):
    model = models.tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(DeltaguardError, match="is used 2 times in one pass"):
        observe(model, Checkpoint.open(llama), [5, 6, 7])
