"""What is known of model families by name against what transformers builds, and what follows for adapters."""

import json
from shutil import copytree

import pytest
import torch
import transformers

import models
from deltaguard import CurvatureStore, DeltaguardError, RestoreConfig, restore, verify
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.experts import refuse_unknown_experts
from deltaguard.models.families import (
    decoder_blocks,
    is_block_matrix,
    is_conv1d,
    is_input_embedding,
    is_linear,
    is_output_head,
    is_parameter,
    is_unread,
    modules_in_blocks,
    stored_in_out,
    ties_embeddings,
)
from pairs import load_over, pair, save_adapter

METHODS = {"kfac": 0.1, "ridge": 0.1, "greedy": 0.5, "published": 0.5, "interpolate": 0.5}
IDS = models.tiny_tokenizer()("How can I make a good cake at home?", return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("name", models.NAMED)
def test_names_say_what_the_modules_are(name):
    model = models.empty_model(name)
    config, modules = model.config.to_dict(), modules_in_blocks(model)
    layers = {f"{path}.weight": module for path, module in modules.items() if is_linear(module)}
    tensors = {path: tuple(tensor.shape) for path, tensor in model.named_parameters()}
    assert {path for path, shape in tensors.items() if is_block_matrix(path, shape)} == layers.keys()
    for path, module in layers.items():
        assert is_conv1d(module) == stored_in_out(config, path), path
    ends = {"input": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}
    by_name = {"input": is_input_embedding, "head": is_output_head}
    for end, weight in ends.items():
        found = [tensor for path, tensor in model.state_dict(keep_vars=True).items() if by_name[end](path)]
        assert found, (end, list(by_name))
        assert all(tensor is weight for tensor in found)
    assert ties_embeddings(config, tensors) == (ends["input"] is ends["head"])
    assert all(is_parameter(path) for path in tensors if path.endswith((".weight", ".bias")))
    assert len(decoder_blocks(model)) == 2
    refuse_unknown_experts(name, config, tensors)
    assert not any(is_unread(config, path) for path in tensors)


@pytest.mark.parametrize("family", ["Gemma3n", "Gemma4"])
def test_keys_and_values_that_are_taken_from_earlier_blocks_are_known_by_name(family):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"intermediate_size": 48, "vocab_size": 64, "vocab_size_per_layer_input": 64}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = getattr(transformers, f"{family}TextConfig")(
        **sizes, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds, hidden_size_per_layer_input=8
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name in model.state_dict() if name.startswith("model.layers.")]
    assert not any(is_unread(config.to_dict(), name) for name in names)
    # What the blocks before have and these have not.
    first = {name.replace("layers.1.", "layers.3.") for name in names if "layers.1." in name}
    assert {name for name in first if is_unread(config.to_dict(), name)} == first - set(names)
    assert first - set(names)


@pytest.mark.parametrize("name", models.DENSE)
def test_how_a_weight_is_stored_is_known_without_a_model(name):
    made = pair(name)
    aligned = Checkpoint.open(made.aligned)
    layers = [layer for group in CurvatureStore.from_pretrained(made.store).groups for layer in group.layers]
    shapes = {aligned.tensors[layer.tensor].shape for layer in layers}
    assert any(rows == columns for rows, columns in shapes)
    for layer in layers:
        assert stored_in_out(aligned.config, layer.tensor) == layer.transposed, layer.tensor


def test_a_store_that_says_otherwise_is_refused_by_the_name_of_the_layer(tmp_path):
    made = pair("gpt2")
    store = copytree(made.store, tmp_path / "store")
    manifest = json.loads((store / "curvature.json").read_text())
    layer = manifest["groups"][0]["group"]["layers"][0]
    layer["transposed"] = False
    (store / "curvature.json").write_text(json.dumps(manifest))
    config = RestoreConfig(strength=0.1)
    with pytest.raises(DeltaguardError, match=r"(?s)c_attn.*\(out, in\).*gpt2 as \(in, out\).*calibrate"):
        restore(made.aligned, made.finetuned, tmp_path / "out", store=store, config=config)
    assert not (tmp_path / "out").exists()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "method", "tuned"),
    # Every two of the three meet.
    [
        (name, method, ("full", "lora")[(i + j) % 2])
        for i, name in enumerate(models.DENSE)
        for j, method in enumerate(METHODS)
    ],
)
def test_peft_makes_of_an_adapter_what_the_checkpoint_of_the_same_options_is(name, method, tuned, tmp_path):
    made = pair(name)
    finetuned = made.finetuned
    if tuned == "lora":
        finetuned = tmp_path / "tuned"
        save_adapter(made.aligned, finetuned, "all-linear", fan_in_fan_out=name in models.STORED_IN_OUT)
    options = {"method": method, "strength": METHODS[method]}
    stores = {"greedy": made.whole_store, "published": made.whole_store, "interpolate": None}
    store = stores.get(method, made.store)
    restore(made.aligned, finetuned, tmp_path / "whole", store=store, config=RestoreConfig(**options))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    config = RestoreConfig(**options, output_format="adapter", adapter_rank=10_000)
    restore(made.aligned, finetuned, tmp_path / "adapter", store=store, config=config)
    adapted = load_over(made.aligned, tmp_path / "adapter")
    before = logits(transformers.AutoModelForCausalLM.from_pretrained(made.aligned))
    expected = logits(whole)
    assert (expected - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert verify(tmp_path / "adapter").passed
