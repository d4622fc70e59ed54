"""Models that also see pictures, or hold what no text reaches: of these the decoder is restored."""

import json
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from deltaguard import DeltaguardError, RestoreConfig, restore, verify
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.families import decoder_blocks
from pairs import ANSWERED, changed

LIMIT = RestoreConfig(max_safety_kl=1e-3, device="cpu")
DECODER = "language_model.model."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The names of the checkpoint are others than the model's, by three prefixes."""
    root = tmp_path_factory.mktemp("seeing")
    model = models.seeing_model()
    aligned = models.save(model, root / "aligned")
    models.save(models.perturbed(model, 0.05), root / "finetuned")
    calibrate(aligned, root / "store", conversations=ANSWERED, config=CalibrateConfig(device="cpu"))
    return root


def restored(made, finetuned, output, config=LIMIT):
    return restore(made / "aligned", finetuned, output, store=made / "store", config=config)


def test_a_dial_restores_what_a_text_reaches(made, tmp_path):
    assert len(decoder_blocks(models.seeing_model())) == 2
    report = restored(made, made / "finetuned", tmp_path / "out")
    assert report.dial.restored_kl <= 1e-3 < report.dial.finetuned_kl
    assert 0 < report.kept_energy < 1
    assert verify(tmp_path / "out").passed
    before, after = (load_file(each / "model.safetensors") for each in (made / "aligned", tmp_path / "out"))
    assert before.keys() == after.keys()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing
    assert all(name.startswith(f"{DECODER}layers.") for name in differing)


@pytest.fixture
def text_alone(made, tmp_path):
    """The fine-tuned model as one that reads text alone."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(made / "finetuned")
    model = transformers.Gemma3ForCausalLM(whole.config.text_config)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    return models.save(model.eval(), tmp_path / "text-alone")


def test_a_fine_tune_saved_for_text_alone_is_restored_so(made, text_alone, tmp_path):
    report = restored(made, text_alone, tmp_path / "out")
    whole = restored(made, made / "finetuned", tmp_path / "whole")
    assert report.dial.restored_kl == pytest.approx(whole.dial.restored_kl, rel=1e-3)
    (told,) = [each for each in report.warnings if "that a text does not need" in each]
    assert "multi_modal_projector" in told
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(text_alone / "model.safetensors").keys()
    transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "out")


def test_a_configuration_with_a_tower_cannot_serve_a_model_without_one(made, text_alone, tmp_path):
    config = LIMIT.model_copy(update={"config_from": "aligned"})
    with pytest.raises(DeltaguardError, match=r"aligned` cannot serve: it describes `multi_modal"):
        restored(made, text_alone, tmp_path / "out", config)


def test_a_block_of_the_decoder_must_be_there(made, text_alone, tmp_path):
    lacking = changed(
        text_alone, tmp_path / "lacking", lambda all_: all_.pop("model.layers.1.mlp.up_proj.weight")
    )
    with pytest.raises(DeltaguardError, match=r"layers\.1\.mlp\.up_proj.*not in the fine-tuned one"):
        restored(made, lacking, tmp_path / "out")


def test_layers_that_predict_further_tokens_may_be_absent(tmp_path):
    """transformers reads none, so that no trainer writes them."""
    model = models.tiny_model("llama")
    plain = models.save(model, tmp_path / "plain")
    finetuned = models.save(models.perturbed(model, 0.05), tmp_path / "finetuned")

    def further(tensors):
        for name in ("mtp.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"):
            tensors[name] = torch.ones(48, 32)
        tensors["mtp.norm.weight"] = torch.ones(32)

    aligned = changed(plain, tmp_path / "aligned", further)
    calibrate(aligned, tmp_path / "store", conversations=ANSWERED, config=CalibrateConfig(device="cpu"))
    report = restore(aligned, finetuned, tmp_path / "out", store=tmp_path / "store", config=LIMIT)
    assert report.dial.restored_kl <= 1e-3
    # A fine-tune that has them, as a merged adapter may, keeps the aligned ones.
    having = changed(finetuned, tmp_path / "having", further)
    report = restore(aligned, having, tmp_path / "other", store=tmp_path / "store", config=LIMIT)
    assert report.dial.restored_kl <= 1e-3
    assert "mtp.norm.weight" in load_file(tmp_path / "other" / "model.safetensors")


@pytest.fixture
def adapter(made, tmp_path):
    """An adapter that PEFT also put on the tower, where nothing was learned."""
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "aligned")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name and "vision" not in name:
                parameter.data.normal_(std=0.5)
        tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_on_the_tower_too_is_restored(made, adapter, tmp_path):
    names = load_file(adapter / "adapter_model.safetensors")
    assert any("vision_tower" in name for name in names)
    opened = AdapterCheckpoint.open(Checkpoint.open(made / "aligned"), adapter)
    assert any(name.startswith("vision_tower.") for name in opened.adapted)
    report = restored(made, adapter, tmp_path / "out")
    assert report.dial.restored_kl <= 1e-3 < report.dial.finetuned_kl


def test_an_adapter_is_called_as_the_one_that_it_is_made_of(made, adapter, tmp_path):
    """One that was trained over the model for text alone is loaded over that."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    text = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if "vision_tower" not in name
    }
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    save_file(text, other / "adapter_model.safetensors", metadata={"format": "pt"})
    for finetuned, prefix in ((adapter, "model.language_model."), (other, "model.")):
        output = tmp_path / f"out-{finetuned.name}"
        config = LIMIT.model_copy(update={"output_format": "adapter"})
        restored(made, finetuned, output, config)
        found = load_file(output / "adapter_model.safetensors")
        assert all(name.startswith(f"base_model.model.{prefix}layers.") for name in found)
        assert found.keys() <= load_file(finetuned / "adapter_model.safetensors").keys()
        targets = json.loads((output / "adapter_config.json").read_text())["target_modules"]
        # The tower has layers of these names, too.
        assert all(name.startswith(f"{prefix}layers.") for name in targets)
