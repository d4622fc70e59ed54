"""An adapter read lazily against what PEFT itself merges."""

import json
import warnings
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltaguard import RestoreConfig, restore
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.folders import find_folders, load_tokenizer
from deltaguard.evaluation.engines.transformers import merge_adapter
from deltaguard.models import hub
from deltaguard.models.adapter import AdapterCheckpoint, is_adapter, open_model
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_model
from models import perturbed, save, tiny_model
from pairs import load_over, pair


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def trained(aligned: Path, folder: Path, *, weights=torch.float32, **options):
    """Write an adapter with random, non-zero weights over `aligned`; the PEFT model that it belongs to."""
    model = transformers.AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    generator = torch.Generator().manual_seed(7)
    with warnings.catch_warnings():
        # PEFT says that it adjusts fan_in_fan_out, and that embeddings are saved.
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1).to(weights)
        wrapped.save_pretrained(folder)
    return wrapped


def check_equals_merged(aligned: Path, folder: Path, wrapped) -> AdapterCheckpoint:
    checkpoint = Checkpoint.open(aligned)
    adapter = AdapterCheckpoint.open(checkpoint, folder)
    wrapped.merge_and_unload().save_pretrained(folder / "merged")
    merged = Checkpoint.open(folder / "merged")
    assert merged.tensors.keys() == adapter.tensors.keys()
    for name in adapter.tensors:
        expected = merged.read(name)
        torch.testing.assert_close(adapter.read(name), expected, rtol=1e-6, atol=1e-6)
        same = torch.equal(checkpoint.read(name), expected)
        assert same == (name not in adapter.adapted), name
    return adapter


CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "llama, output embedding": ("llama", {"target_modules": ["v_proj", "lm_head"]}),
    "qwen3, all layers": ("qwen3", {"target_modules": "all-linear"}),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}),
    "phi3, fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "gpt2, Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "opt": ("opt", {"target_modules": ["q_proj", "fc1"]}),
    "mixtral, attention": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "rank and alpha patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"model.layers.0.self_attn.k_proj": 3, "up_proj": 1},
        },
    ),
    "rsLoRA": ("mistral", {"target_modules": ["q_proj"], "use_rslora": True, "r": 5}),
    "rsLoRA with patterns": (
        "mistral",
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    ),
    "whole modules": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    ),
    "layers chosen": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize(("architecture", "options"), CASES.values(), ids=CASES.keys())
def test_equals_what_peft_merges(tmp_path, architecture, options):
    aligned = save(tiny_model(architecture), tmp_path / "aligned", max_shard_size="60KB")
    wrapped = trained(aligned, tmp_path / "adapter", **options)
    adapter = check_equals_merged(aligned, tmp_path / "adapter", wrapped)
    assert adapter.adapted
    for name in adapter.tensors:
        check_thin(adapter, name)


# This PEFT asks transformers by a name that transformers 6 will drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(("architecture", "options"), CASES.values(), ids=CASES.keys())
def test_an_evaluated_adapter_is_what_peft_makes_of_its_own_configuration(tmp_path, architecture, options):
    aligned = save(tiny_model(architecture), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", **options)
    expected = load_over(aligned, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = merge_adapter(load_model(aligned, "aligned"), tmp_path / "adapter", "adapter").state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name
    before = load_model(aligned, "aligned").state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_evaluated_adapter_may_name_its_modules_with_another_prefix(tmp_path):
    aligned = save(tiny_model("gpt2"), tmp_path / "aligned")
    expected = trained(aligned, tmp_path / "adapter", target_modules=["c_attn"]).merge_and_unload()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace(".transformer.", "."): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    merged = merge_adapter(load_model(aligned, "aligned"), tmp_path / "adapter", "adapter").state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


@pytest.mark.parametrize("own", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_evaluated_adapter_has_its_own_files_and_its_models_in_the_place_of_others(own, tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(aligned))
    other = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    content = other if own.endswith("jinja") else (aligned / own).read_text()
    (tmp_path / "adapter" / own).write_text(content)
    found = load_tokenizer(str(tmp_path / "adapter"))
    assert (found.chat_template == other) == own.endswith("jinja")
    assert found.vocab_size > 0


def check_thin(adapter: AdapterCheckpoint, name: str) -> None:
    """What the adapter adds is the product it says; what it holds whole, or not at all, has none."""
    change, thin = adapter._changes.get(name), adapter.thin_delta(name)
    assert (thin is None) == (change is None or change.replaced is not None)
    if thin is not None:
        product = thin.up @ thin.down
        delta = adapter.read(name) - adapter.aligned.read(name)
        torch.testing.assert_close(product.T if change.transposed else product, delta, atol=1e-6, rtol=0)


def test_half_precision_adapters_are_expanded_in_float32(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned", dtype=torch.bfloat16)
    trained(aligned, tmp_path / "adapter", weights=torch.bfloat16, target_modules=["q_proj"])
    adapter = AdapterCheckpoint.open(Checkpoint.open(aligned), tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    weight = adapter.read(f"{name}.weight")
    assert weight.dtype == torch.float32
    expected = adapter.aligned.read(f"{name}.weight").double() + 2 * b @ a
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)


def test_what_is_untouched_comes_from_the_aligned_checkpoint(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned", dtype=torch.bfloat16, max_shard_size="40KB")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    checkpoint = Checkpoint.open(aligned)
    adapter = AdapterCheckpoint.open(checkpoint, tmp_path / "adapter")
    assert adapter.adapted == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert (adapter.tensors, adapter.shards, adapter.index_name, adapter.config) == (
        checkpoint.tensors,
        checkpoint.shards,
        checkpoint.index_name,
        checkpoint.config,
    )
    assert adapter.folder == tmp_path / "adapter"
    assert all(adapter.header(shard) == checkpoint.header(shard) for shard in adapter.shards)
    assert adapter.read("lm_head.weight").dtype == torch.bfloat16


def test_a_restore_reads_once_what_an_adapter_leaves_alone(tmp_path, monkeypatch):
    made = pair()
    trained(made.aligned, tmp_path / "adapter", target_modules=["q_proj"])
    read, seen = Checkpoint.read, Counter()
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: seen.update([name]) or read(self, name))
    config = RestoreConfig(strength=0.5)
    restore(made.aligned, tmp_path / "adapter", tmp_path / "out", store=made.store, config=config)
    name = "model.layers.0.mlp.up_proj.weight"
    # To write: that it adds nothing to the price is known.
    assert seen[name] == 1


def test_names_may_differ_by_a_prefix(tmp_path):
    aligned = save(tiny_model("gpt2"), tmp_path / "aligned")
    wrapped = trained(aligned, tmp_path / "adapter", target_modules=["c_attn"])
    weights = load_file(aligned / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in weights.items()},
        aligned / "model.safetensors",
    )
    adapter = AdapterCheckpoint.open(Checkpoint.open(aligned), tmp_path / "adapter")
    assert adapter.adapted == {"h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"}
    expected = wrapped.merge_and_unload().state_dict()["transformer.h.1.attn.c_attn.weight"]
    torch.testing.assert_close(adapter.read("h.1.attn.c_attn.weight"), expected, rtol=1e-6, atol=1e-6)


def test_the_fingerprint_follows_the_weights_and_the_scale(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    other = save(perturbed(tiny_model("llama"), 0.01), tmp_path / "other")

    def fingerprint(model):
        return AdapterCheckpoint.open(Checkpoint.open(model), tmp_path / "adapter").fingerprint()

    before = fingerprint(aligned)
    assert before == fingerprint(aligned)
    assert before not in {fingerprint(other), Checkpoint.open(aligned).fingerprint()}
    edit_config(tmp_path / "adapter", lora_alpha=9)
    after = fingerprint(aligned)
    assert after != before
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    assert fingerprint(aligned) != after


def edit_config(folder: Path, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(aligned: Path, folder: Path) -> str:
    with pytest.raises(DeltaguardError) as error:
        AdapterCheckpoint.open(Checkpoint.open(aligned), folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "biases"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ],
)
def test_other_kinds_of_lora_are_refused_by_name(tmp_path, options, word):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"], **options)
    message = refusal(aligned, tmp_path / "adapter")
    assert word in message
    assert "merge_and_unload" in message


def test_adapted_parameters_of_experts_are_refused(tmp_path):
    aligned = save(tiny_model("mixtral"), tmp_path / "aligned")
    trained(
        aligned,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    assert "target_parameters" in refusal(aligned, tmp_path / "adapter")


def test_adapted_embeddings_are_refused(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    message = refusal(aligned, tmp_path / "adapter")
    assert "embed_tokens.lora_embedding_A is not understood" in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_side_of_tied_embeddings_is_refused(tmp_path, module):
    aligned = save(tiny_model("qwen3"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=[module])
    message = refusal(aligned, tmp_path / "adapter")
    assert f"{module}.weight" in message
    assert "input embedding" in message


def test_other_peft_types_are_refused(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    peft.IA3Config(task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    assert "IA3" in refusal(aligned, tmp_path / "adapter")


def test_several_reasons_are_listed_at_once(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(tmp_path / "adapter", use_dora=True, bias="all", a_newer_option=3)
    message = refusal(aligned, tmp_path / "adapter")
    assert all(word in message for word in ("use_dora", "'all'", "a_newer_option", "upgrade"))


def test_an_adapter_of_another_model_is_refused_with_all_that_does_not_fit(tmp_path):
    save(tiny_model("llama"), tmp_path / "aligned")
    other = save(tiny_model("llama", num_hidden_layers=3, intermediate_size=40), tmp_path / "other")
    trained(other, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    message = refusal(tmp_path / "aligned", tmp_path / "adapter")
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.down_proj.weight: B A is (32, 40) (out, in)" in message
        assert f"layers.{layer}.self_attn" not in message
    assert "has no model.layers.2.self_attn.q_proj.weight" in message
    assert "has no model.layers.2.mlp.down_proj.weight" in message
    assert str(other) in message


def test_a_model_of_another_name_is_no_error(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(tmp_path / "adapter", base_model_name_or_path="somebody/elses")
    assert AdapterCheckpoint.open(Checkpoint.open(aligned), tmp_path / "adapter").adapted


def test_an_evaluated_adapter_takes_its_model_at_the_revision_that_it_names(tmp_path, monkeypatch):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(tmp_path / "adapter", base_model_name_or_path="somebody/elses", revision="v1")
    asked = []

    def fetch(repository, **options):
        asked.append((repository, options["revision"]))
        return str(aligned)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert find_folders(str(tmp_path / "adapter")).model == aligned
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(aligned))
    assert find_folders(str(tmp_path / "adapter")).model == aligned
    assert asked == [("somebody/elses", "v1")]


def test_a_model_that_an_adapter_names_and_nobody_finds_is_told_as_such(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(tmp_path / "adapter", base_model_name_or_path="/content/model")
    with pytest.raises(DeltaguardError, match=r"names /content/model as its model .*Correct it there"):
        open_model(tmp_path / "adapter")


def test_a_configuration_that_a_trainer_wrote_beside_it_is_no_part_of_an_adapter(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "adapter" / name).write_text('{"vocab_size": 999, "quantization_config": {}}')
    files = AdapterCheckpoint.open(Checkpoint.open(aligned), tmp_path / "adapter").files()
    assert files["config.json"] == aligned / "config.json"
    assert files["generation_config.json"] == aligned / "generation_config.json"


def test_a_resized_vocabulary_is_refused(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    larger = save(tiny_model("llama", vocab_size=390), tmp_path / "larger")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    trained(larger, tmp_path / "adapter", **options)
    message = refusal(aligned, tmp_path / "adapter")
    assert "(390, 32)" in message
    assert "(384, 32)" in message


def test_spoiled_adapter_files_are_listed(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    prefix = "base_model.model.model.layers"
    del weights[f"{prefix}.0.self_attn.q_proj.lora_B.weight"]
    weights[f"{prefix}.1.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(32)
    weights["something.else"] = torch.ones(2)
    save_file(weights, path)
    message = refusal(aligned, tmp_path / "adapter")
    assert "layers.0.self_attn.q_proj.weight: the adapter has only one of" in message
    assert "lora_magnitude_vector is not understood" in message
    assert "something.else is not understood" in message
    edit_config(tmp_path / "adapter", r=3)
    assert "A and B have the ranks (4, 4); the configuration says 3" in refusal(aligned, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", r=0)
    assert "`r`: Input should be greater than or equal to 1 (it is 0)" in refusal(
        aligned, tmp_path / "adapter"
    )


def test_a_weight_that_peft_would_not_read_is_refused(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.q_proj.weight"
    save_file({**load_file(path), name: torch.ones(32, 32)}, path)
    assert f"PEFT would not read {name}" in refusal(aligned, tmp_path / "adapter")


def test_pickled_missing_and_truncated_adapters_are_refused(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert "truncated" in refusal(aligned, tmp_path / "adapter")
    path.rename(path.with_name("adapter_model.bin"))
    assert "save_file" in refusal(aligned, tmp_path / "adapter")
    path.with_name("adapter_model.bin").unlink()
    assert "there is no adapter_model.safetensors" in refusal(aligned, tmp_path / "adapter")
    path.with_name("adapter_config.json").unlink()
    assert "not a PEFT adapter" in refusal(aligned, tmp_path / "adapter")


def test_adapters_are_told_from_models(tmp_path):
    aligned = save(tiny_model("llama"), tmp_path / "aligned")
    trained(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(aligned)
    with pytest.raises(DeltaguardError, match="FINETUNED only"):
        Checkpoint.open(tmp_path / "adapter")
    # As trainers of rewards write it.
    save_file({"v_head.weight": torch.ones(1, 2)}, tmp_path / "adapter" / "value_head.safetensors")
    assert is_adapter(tmp_path / "adapter")
    save(tiny_model("llama"), tmp_path / "adapter")
    with pytest.raises(DeltaguardError, match="both an adapter"):
        is_adapter(tmp_path / "adapter")
