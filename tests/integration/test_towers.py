"""A model that also sees pictures: what a text reaches is calibrated and restored, its tower is kept."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import models
from deltaguard import RestoreConfig, restore, verify
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.families import decoder_blocks
from pairs import ANSWERED


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """As Gemma 3 of 4B and more: the checkpoint's names are others than the model's, by three prefixes."""
    text = transformers.Gemma3TextConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert len(decoder_blocks(model)) == 2
    folder = tmp_path_factory.mktemp("towers")
    aligned = models.save(model, folder / "aligned")
    finetuned = models.save(models.perturbed(model, 0.05), folder / "finetuned")
    calibrate(aligned, folder / "store", conversations=ANSWERED, config=CalibrateConfig(device="cpu"))
    return aligned, finetuned, folder / "store"


def test_a_dial_restores_what_a_text_reaches(pair, tmp_path):
    aligned, finetuned, store = pair
    config = RestoreConfig(max_safety_kl=1e-3, device="cpu")
    report = restore(aligned, finetuned, tmp_path / "out", store=store, config=config)
    assert report.dial.restored_kl <= 1e-3 < report.dial.finetuned_kl
    assert 0 < report.kept_energy < 1
    assert verify(tmp_path / "out").passed
    before, after = (load_file(each / "model.safetensors") for each in (aligned, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("language_model.model.layers.") for name in changed)
