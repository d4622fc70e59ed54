"""A model that also sees pictures: what a text reaches is calibrated and restored, its tower is kept."""

import torch
from safetensors.torch import load_file

import models
from deltaguard import RestoreConfig, restore, verify
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.families import decoder_blocks
from pairs import ANSWERED


def test_a_dial_restores_what_a_text_reaches(tmp_path):
    model = models.seeing_model()
    assert len(decoder_blocks(model)) == 2
    # The names of the checkpoint are others than the model's, by three prefixes.
    aligned = models.save(model, tmp_path / "aligned")
    finetuned = models.save(models.perturbed(model, 0.05), tmp_path / "finetuned")
    store = tmp_path / "store"
    calibrate(aligned, store, conversations=ANSWERED, config=CalibrateConfig(device="cpu"))
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
