"""What goes wrong outside during a calibration block by block: one message, and a run that can be resumed."""

import errno
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError

import models
from deltaguard.curvature import calibrate as calibrate_module
from deltaguard.curvature import staged
from deltaguard.curvature.blocks import CutModel
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.errors import DeltaguardError
from pairs import ANSWERED

CONFIG = CalibrateConfig(memory=0, batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return models.save(
        models.tiny_model("llama", num_hidden_layers=3), tmp_path_factory.mktemp("a") / "model"
    )


def run(aligned, out, *, at=None, do=None, resume=False):
    """Calibrate, and do something once a stage is so far; the bytes of the store."""

    def listen(event):
        if (event.stage, event.done) == at:
            do()

    config = CONFIG.model_copy(update={"resume": resume})
    store = calibrate(aligned, out, conversations=ANSWERED, config=config, progress=listen)
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


@pytest.mark.parametrize("at", [("forwards", 1), ("forwards", 3), ("backwards", 1), ("backwards", 2)])
def test_a_spill_folder_that_vanishes_is_one_message_and_the_run_begins_anew(at, aligned, tmp_path):
    spilled = tmp_path / "store.partial" / "blocks"
    with pytest.raises(DeltaguardError, match=r"cannot be (written|used).*No such file") as caught:
        run(aligned, tmp_path / "store", at=at, do=lambda: shutil.rmtree(spilled))
    assert str(spilled) in str(caught.value)
    assert not (tmp_path / "store").exists()
    assert run(aligned, tmp_path / "store", resume=True) == run(aligned, tmp_path / "undisturbed")


@pytest.mark.parametrize("writes", [1, 4, 6])
def test_a_full_disk_loses_nothing(writes, aligned, tmp_path, monkeypatch):
    real, left = staged.save_file, [writes]

    def full(tensors, path):
        left[0] -= 1
        if left[0] < 0:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(staged, "save_file", full)
        with pytest.raises(
            DeltaguardError, match=r"There is no space left for .* bytes are needed .*--resume"
        ):
            run(aligned, tmp_path / "store")
    assert run(aligned, tmp_path / "store", resume=True) == run(aligned, tmp_path / "undisturbed")


def test_a_disk_that_tells_late_that_it_is_full(aligned, tmp_path, monkeypatch):
    """As file systems over a network do, when a file is to be on the disk."""
    left = [2]

    def full(path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(staged, "sync", full)
        with pytest.raises(DeltaguardError, match=rf"{os.strerror(errno.EDQUOT)}|no space left"):
            run(aligned, tmp_path / "store")
    assert run(aligned, tmp_path / "store", resume=True) == run(aligned, tmp_path / "undisturbed")


def test_too_little_memory_of_a_device_is_told_with_numbers_and_can_be_resumed(
    aligned, tmp_path, monkeypatch
):
    real, left = CutModel.run, [4]

    def scarce(cut, number, hidden, call):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
        return real(cut, number, hidden, call)

    with monkeypatch.context() as patched:
        patched.setattr(CutModel, "run", scarce)
        said = r"cpu has too little memory .* a single conversation: Tried to allocate 2\.00 GiB\. Take "
        with pytest.raises(DeltaguardError, match=said):
            run(aligned, tmp_path / "store")
    assert run(aligned, tmp_path / "store", resume=True) == run(aligned, tmp_path / "undisturbed")


def test_a_model_that_does_not_fit_as_a_whole_is_advised_to_go_by_blocks(aligned, tmp_path, monkeypatch):
    def scarce(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(calibrate_module, "observe", scarce)
    with pytest.raises(DeltaguardError, match=r"GiB\. Calibrate block by block \(`--memory 0`\), take "):
        calibrate(aligned, tmp_path / "store", conversations=ANSWERED, config=CalibrateConfig(device="cpu"))


@pytest.mark.parametrize("at", [("forwards", 2), ("backwards", 2)])
def test_a_source_that_changes_makes_no_store(at, aligned, tmp_path):
    model = shutil.copytree(aligned, tmp_path / "model")
    with pytest.raises(DeltaguardError, match=r"model\.safetensors was written to"):
        run(model, tmp_path / "store", at=at, do=lambda: os.utime(model / "model.safetensors", (1, 1)))
    assert not (tmp_path / "store").exists()
