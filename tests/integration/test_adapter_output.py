"""A restore that writes an adapter: PEFT loads it, the dial holds for it, nothing is lost unsaid."""

import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from deltaguard import CurvatureStore, DeltaguardError, RestoreConfig, restore, solvers, verify
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL
from pairs import load_over, pair, save_adapter, weights
from plain import safety_kl

ADAPTER = {"output_format": "adapter"}


def merged(aligned, adapter, folder):
    """A whole checkpoint of the aligned model with the adapter merged into it by PEFT."""
    return models.save(load_over(aligned, adapter).merge_and_unload(), folder)


@pytest.mark.parametrize("name", models.DENSE)
def test_peft_loads_what_a_checkpoint_would_hold(name, tmp_path):
    made = pair(name)
    whole = restore(
        made.aligned,
        made.finetuned,
        tmp_path / "whole",
        store=made.store,
        config=RestoreConfig(strength=0.1),
    )
    report = restore(
        made.aligned,
        made.finetuned,
        tmp_path / "adapter",
        store=made.store,
        config=RestoreConfig(strength=0.1, adapter_rank=10_000, **ADAPTER),
    )
    assert [row.name for row in report.layers] == [row.name for row in whole.layers]
    loaded = weights(merged(made.aligned, tmp_path / "adapter", tmp_path / "merged"))
    expected = weights(tmp_path / "whole")
    for row in whole.layers:
        torch.testing.assert_close(loaded[row.name], expected[row.name], rtol=0, atol=1e-5)
    assert verify(tmp_path / "adapter").passed


def assert_of_what_is_written(report, made, folder):
    """The numbers of each layer are those of the delta on disk."""
    store = CurvatureStore.from_pretrained(made.store)
    aligned, tuned, found = (weights(each) for each in (made.aligned, made.finetuned, folder))
    for row in report.layers:
        whole, left = (each[row.name].double() - aligned[row.name] for each in (tuned, found))
        H = store.input_spectrum(store.group_of(row.name).name).dense().double()
        energy, cost = whole.square().sum(), ((whole @ H) * whole).sum()
        assert row.kept_energy == pytest.approx(float((whole * left).sum() / energy), abs=1e-4)
        assert row.utility_loss == pytest.approx(float((whole - left).square().sum() / energy), abs=1e-4)
        assert row.safety_cost == pytest.approx(float(((left @ H) * left).sum() / cost), abs=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_of_an_adapter_cut_off_the_report_says_what_is_left(rank, tmp_path):
    made = pair()
    whole = Checkpoint.open(made.finetuned).folder
    tuned = adapter_over(made.aligned, tmp_path / "tuned", rank=4)
    config = RestoreConfig(strength=1.0, adapter_rank=rank, **ADAPTER)
    for number, finetuned in enumerate((whole, tuned)):
        out = tmp_path / str(number)
        report = restore(made.aligned, finetuned, out, store=made.store, config=config)
        assert max(row.utility_loss for row in report.layers) > 0.01
        other = merged(made.aligned, finetuned, tmp_path / "whole") if number else made.finetuned
        now = replace(made, finetuned=other)
        changed = report.model_copy(update={"layers": tuple(r for r in report.layers if r.delta_norm > 0)})
        assert_of_what_is_written(changed, now, merged(made.aligned, out, tmp_path / f"merged-{number}"))


def test_that_holds_for_methods_without_curvature(tmp_path):
    made = pair()
    config = RestoreConfig(method="interpolate", strength=1.0, adapter_rank=1, **ADAPTER)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", config=config)
    aligned, tuned = weights(made.aligned), weights(made.finetuned)
    found = weights(merged(made.aligned, tmp_path / "out", tmp_path / "merged"))
    assert report.layers
    for row in report.layers:
        whole, left = (each[row.name].double() - aligned[row.name] for each in (tuned, found))
        energy = whole.square().sum()
        assert row.utility_loss > 0.01
        assert row.utility_loss == pytest.approx(float((whole - left).square().sum() / energy), abs=1e-4)
        assert row.kept_energy == pytest.approx(float((whole * left).sum() / energy), abs=1e-4)


def test_a_base_in_the_home_folder_is_named_so_that_others_find_it(tmp_path, monkeypatch):
    made = pair()
    monkeypatch.setenv("HOME", str(made.aligned.parent))
    config = RestoreConfig(strength=0.5, **ADAPTER)
    restore(f"~/{made.aligned.name}", made.finetuned, tmp_path / "out", store=made.store, config=config)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(made.aligned)


def test_the_rank_is_chosen_and_what_it_loses_stands_in_the_report(tmp_path):
    made = pair()
    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, **ADAPTER)
    chosen = restore(made.aligned, made.finetuned, tmp_path / "a", store=made.store, config=config)
    assert all(row.detail["adapter_residual"] <= 0.01 for row in chosen.layers)
    given = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, adapter_rank=3, **ADAPTER)
    report = restore(made.aligned, made.finetuned, tmp_path / "b", store=made.store, config=given)
    assert {row.detail["adapter_rank"] for row in report.layers} == {3}
    assert_of_what_is_written(report, made, merged(made.aligned, tmp_path / "b", tmp_path / "merged"))
    assert '"adapter_rank":3,' in report.model_dump_json()
    assert any(row.detail["adapter_residual"] > 0.01 for row in report.layers)


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_the_dial_holds_for_what_is_loaded(tmp_path, stored, memory):
    """However the fine-tuned model is stored: below an adapter lies the aligned one."""
    made = pair()
    finetuned = made.finetuned
    if stored is not None:
        tuned = transformers.AutoModelForCausalLM.from_pretrained(finetuned)
        finetuned = models.save(tuned, tmp_path / "tuned", dtype=stored)
    limit = 1e-4
    config = RestoreConfig(max_safety_kl=limit, adapter_rank=4, memory=memory, **ADAPTER)
    report = restore(made.aligned, finetuned, tmp_path / "adapter", store=made.store, config=config)
    assert report.dial.by_blocks == (memory is not None)
    loaded = merged(made.aligned, tmp_path / "adapter", tmp_path / "merged")
    found = safety_kl(made.aligned, loaded, CurvatureStore.from_pretrained(made.store).held_out)
    assert 0 < found <= limit * 1.001
    assert found == pytest.approx(report.dial.restored_kl, rel=1e-2)


@pytest.mark.parametrize("memory", [None, 1])
def test_over_weights_of_half_precision_the_dial_holds_for_what_layers_compute(tmp_path, memory):
    """Beside a weight in bfloat16 PEFT adds the whole delta; merged, most of a small one is rounded away."""
    made = pair(dtype=torch.bfloat16)
    tuned = adapter_over(made.aligned, tmp_path / "tuned", rank=2, std=0.003)
    config = RestoreConfig(max_safety_kl=1e-6, memory=memory, **ADAPTER)
    report = restore(made.aligned, tuned, tmp_path / "adapter", store=made.store, config=config)
    held_out = CurvatureStore.from_pretrained(made.store).held_out
    for folder, measured in (
        (tuned, report.dial.finetuned_kl),
        (tmp_path / "adapter", report.dial.restored_kl),
    ):
        loaded = load_over(made.aligned, folder, dtype=torch.float32).merge_and_unload()
        whole = models.save(loaded, tmp_path / f"{folder.name}-whole")
        rounded = models.save(loaded, tmp_path / f"{folder.name}-rounded", dtype=torch.bfloat16)
        found, merged = (safety_kl(made.aligned, each, held_out) for each in (whole, rounded))
        assert measured == pytest.approx(found, rel=2e-2)
        assert measured != pytest.approx(merged, rel=2e-2)


@pytest.mark.parametrize("memory", [None, 1])
def test_an_adapter_of_which_nothing_is_allowed_is_not_to_be_resumed(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(solvers.Profile, "predicted_kl", lambda _, __: 0.0)
    made = pair()
    config = RestoreConfig(max_safety_kl=1e-3, memory=memory, **ADAPTER)
    with pytest.raises(DeltaguardError, match="Within the limits nothing is left of the delta"):
        restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    assert not list(tmp_path.iterdir())


def test_a_pair_without_a_delta_leaves_no_adapter_to_be_resumed(tmp_path):
    made = pair()
    config = RestoreConfig(max_safety_kl=1e-3, **ADAPTER)
    with pytest.raises(DeltaguardError, match="is zero: the adapter would be empty"):
        restore(made.aligned, made.aligned, tmp_path / "out", store=made.store, config=config)
    assert not list(tmp_path.iterdir())


def adapter_over(aligned, folder, *, rank, whole=None, std=0.1):
    """A random adapter on two kinds of layers; `whole` is a layer that it replaces instead."""
    base = transformers.AutoModelForCausalLM.from_pretrained(aligned)
    names = ["q_proj", "down_proj"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PEFT asks transformers for something under a name that is to go.
        warnings.simplefilter("ignore", FutureWarning)
        config = peft.LoraConfig(r=rank, target_modules=names, modules_to_save=[whole] if whole else None)
        tuned = peft.get_peft_model(base, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=std)
    tuned.save_pretrained(folder)
    return folder


def test_an_adapter_in_gives_an_adapter_out(tmp_path):
    made = pair()
    report = restore(
        made.aligned,
        adapter_over(made.aligned, tmp_path / "tuned", rank=2),
        tmp_path / "out",
        store=made.store,
        config=RestoreConfig(strength=0.5, **ADAPTER),
    )
    changed = {row.name.split(".")[-2] for row in report.layers if row.delta_norm > 0}
    assert changed == {"q_proj", "down_proj"}
    written = weights(tmp_path / "out")
    assert {name.split(".")[-3] for name in written} == changed
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def restore_without_loss(made, tuned, folder):
    """To an adapter of more ranks than any layer has."""
    config = RestoreConfig(strength=0.5, adapter_rank=10_000, **ADAPTER)
    return restore(made.aligned, tuned, folder, store=made.store, config=config)


def test_an_adapter_of_rank_one_stays_a_product_and_is_what_its_merged_model_becomes(tmp_path, monkeypatch):
    made = pair()
    tuned = adapter_over(made.aligned, tmp_path / "tuned", rank=1)

    def refused(delta, *, rank):
        raise AssertionError("a whole delta was decomposed")

    monkeypatch.setattr(solvers, "low_rank", refused)
    restore_without_loss(made, tuned, tmp_path / "adapter")
    restore(
        made.aligned,
        merged(made.aligned, tuned, tmp_path / "whole"),
        tmp_path / "checkpoint",
        store=made.store,
        config=RestoreConfig(strength=0.5),
    )
    loaded = weights(merged(made.aligned, tmp_path / "adapter", tmp_path / "merged"))
    for name, expected in weights(tmp_path / "checkpoint").items():
        torch.testing.assert_close(loaded[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "whole", "dtype", "close"),
    [
        (64, None, None, 1e-5),
        (1, "up_proj", None, 1e-5),
        (64, "up_proj", None, 1e-5),
        (1, None, torch.bfloat16, 2e-2),
    ],
    ids=["rank above the layers'", "a layer replaced", "both", "half precision"],
)
def test_of_any_adapter_an_adapter_is_what_a_checkpoint_would_hold(rank, whole, dtype, close, tmp_path):
    made = pair(dtype=dtype)
    tuned = adapter_over(made.aligned, tmp_path / "tuned", rank=rank, whole=whole)
    restore_without_loss(made, tuned, tmp_path / "adapter")
    report = restore(
        made.aligned, tuned, tmp_path / "whole", store=made.store, config=RestoreConfig(strength=0.5)
    )
    changed = {row.name for row in report.layers if row.delta_norm > 0}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj", *([whole] if whole else [])}
    loaded = weights(merged(made.aligned, tmp_path / "adapter", tmp_path / "merged"))
    before, expected = weights(made.aligned), weights(tmp_path / "whole")
    for name in changed:
        assert not torch.equal(loaded[name], before[name])
        torch.testing.assert_close(loaded[name], expected[name], rtol=0, atol=close)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype or torch.float32}


@pytest.mark.parametrize("method", ["kfac", "ridge"])
def test_of_an_adapter_no_weight_is_read(method, tmp_path, monkeypatch):
    made = pair()
    tuned = adapter_over(made.aligned, tmp_path / "tuned", rank=1)
    read: set[str] = set()
    plain = Checkpoint.read

    def listening(checkpoint, name):
        read.add(name)
        return plain(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", listening)
    config = RestoreConfig(method=method, strength=0.5, **ADAPTER)
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert len(report.layers) > sum(row.delta_norm > 0 for row in report.layers) > 0
    assert report.others
    assert not any(row.differs for row in report.others)
    assert not read


@pytest.mark.parametrize("broken", ["lora_A", "lora_B"])
@pytest.mark.parametrize("other_is_zero", [False, True])
def test_an_adapter_that_is_not_finite_is_refused_by_the_name_of_the_layer(broken, other_is_zero, tmp_path):
    made = pair()
    tuned = adapter_over(made.aligned, tmp_path / "tuned", rank=1)
    file = tuned / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if broken in name)
    tensors[name][0, 0] = float("nan")
    if other_is_zero:
        other = "lora_B" if broken == "lora_A" else "lora_A"
        tensors[name.replace(broken, other)].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    config = RestoreConfig(strength=0.5, **ADAPTER)
    layer = name.removeprefix("base_model.model.").removesuffix(f".{broken}.weight")
    with pytest.raises(DeltaguardError, match=rf"(?s){layer}.*NaN or infinite"):
        restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert not (tmp_path / "out").exists()


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    made = pair()
    with pytest.raises(ValueError, match="leaves norms, biases and embeddings"):
        RestoreConfig(other_params="finetuned", **ADAPTER)
    with pytest.raises(ValueError, match="adapter_rank is an option"):
        RestoreConfig(adapter_rank=2)
    larger = models.tiny_model("llama", vocab_size=models.VOCABULARY + 8)
    models.save(larger, tmp_path / "larger")
    with pytest.raises(DeltaguardError, match=r"(?s)cannot hold .*embed_tokens"):
        restore(
            made.aligned,
            tmp_path / "larger",
            tmp_path / "out",
            store=made.store,
            config=RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, **ADAPTER),
        )
    assert not (tmp_path / "out").exists()


def test_rows_that_an_adapter_leaves_alone_need_not_be_held(tmp_path):
    # As of models with more rows than tokens.
    models.save(models.tiny_model("llama", vocab_size=models.VOCABULARY + 8), tmp_path / "aligned")
    tuned = adapter_over(tmp_path / "aligned", tmp_path / "tuned", rank=2)
    tokenizer = models.tiny_tokenizer()
    tokenizer.add_tokens(["<|one more|>"])
    tokenizer.save_pretrained(tuned)
    config = RestoreConfig(method="interpolate", strength=0.5, config_from="aligned", **ADAPTER)
    restore(tmp_path / "aligned", tuned, tmp_path / "out", config=config)
    assert all(".q_proj." in name or ".down_proj." in name for name in weights(tmp_path / "out"))


def test_what_must_be_known_of_an_adapter_is_told(tmp_path):
    made = pair("llama")
    config = RestoreConfig(strength=0.5, **ADAPTER)
    whole = restore(made.aligned, made.finetuned, tmp_path / "whole", store=made.store, config=config)
    large, named = whole.warnings[-2:]
    assert "ranks go up to" in large
    assert "--adapter-rank" in large
    assert f"by a path of this machine, {made.aligned}" in named
    tuned = tmp_path / "tuned"
    save_adapter(made.aligned, tuned, ["q_proj"])
    settings = json.loads((tuned / "adapter_config.json").read_text())
    bases = {"model-bnb-4bit": "the 16-bit model it was made from", "model-AWQ": "layers see scaled inputs"}
    for base, told in bases.items():
        settings["base_model_name_or_path"] = base
        (tuned / "adapter_config.json").write_text(json.dumps(settings))
        thin = restore(made.aligned, tuned, tmp_path / base, store=made.store, config=config)
        assert any(f"over {base}, by" in warning and told in warning for warning in thin.warnings)
        assert not any("ranks go up to" in warning for warning in thin.warnings)


def test_factors_have_the_precision_of_the_model_that_they_belong_to(tmp_path):
    made, tuned = pair(), models.perturbed(models.tiny_model("llama"), 0.05)
    finetuned = models.save(tuned, tmp_path / "tuned", dtype=torch.float16)
    config = RestoreConfig(strength=0.3, adapter_rank=4, **ADAPTER)
    restore(made.aligned, finetuned, tmp_path / "out", store=made.store, config=config)
    factors = weights(tmp_path / "out").values()
    assert {factor.dtype for factor in factors} == {torch.float32}
    assert not any(torch.equal(factor.half().float(), factor) for factor in factors)
