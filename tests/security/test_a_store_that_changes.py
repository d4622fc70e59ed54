"""A store that is written to once it is open: its numbers make no result, and the message says where."""

import os
import shutil
from functools import partial

import pytest

from deltaguard import CurvatureStore, DeltaguardError, RestoreConfig, restore, sweep
from deltaguard.models.opened import OpenFile
from deltaguard.models.shards import parse_header, read_header, read_tensor, tensor_bytes
from deltaguard.solvers import Projection
from pairs import pair, save_adapter

SPOILED = "model.layers.1.mlp.down_proj"
HALF = RestoreConfig(strength=0.5)


@pytest.fixture
def store(tmp_path):
    """Opened, in a folder that a test may spoil."""
    return CurvatureStore.from_pretrained(shutil.copytree(pair().store, tmp_path / "store"))


def scale(store, tensor, factor):
    """Multiply a tensor in its file, as it lies on disk."""
    for path in store.folder.glob("*.safetensors"):
        file = OpenFile(path)
        for info in parse_header(read_header(file), path.name):
            if info.name == tensor:
                with path.open("r+b") as stream:
                    stream.seek(info.start)
                    stream.write(tensor_bytes(read_tensor(file, info) * factor))


@pytest.fixture
def adapter(tmp_path):
    save_adapter(pair().aligned, tmp_path / "adapter", ["down_proj", "q_proj"])
    return tmp_path / "adapter"


@pytest.mark.parametrize("part", ["input.vectors", "output.vectors", "input.values"])
@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "adapter of an adapter"])
def test_no_delta_larger_than_the_fine_tunes_is_written(store, adapter, tmp_path, kind, part):
    finetuned = adapter if "of an adapter" in kind else pair().finetuned
    config = HALF.model_copy(update={"output_format": kind.split()[0]})
    scale(store, f"{SPOILED}.{part}", -1.0 if part == "input.values" else 60_000.0)
    with pytest.raises(DeltaguardError, match=rf"Tensor `{SPOILED}\.weight`: The curvature"):
        restore(pair().aligned, finetuned, tmp_path / "out", store=store, config=config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limits", [[1e-9], [1e-3]])
def test_no_point_of_a_sweep_is_made_of_it(store, tmp_path, limits):
    scale(store, f"{SPOILED}.output.vectors", 60_000.0)
    with pytest.raises(DeltaguardError, match=rf"Tensor `{SPOILED}\.weight`: The curvature"):
        sweep(pair().aligned, pair().finetuned, tmp_path / "out", store=store, limits=limits)


def test_a_point_that_cannot_be_names_its_tensor(store, tmp_path, monkeypatch):
    def fail(*_given, **_named):
        raise ValueError("The restored delta is larger than the delta.")

    monkeypatch.setattr(Projection, "restored", fail)
    with pytest.raises(DeltaguardError, match=r"Tensor `model\.layers\..*`: The restored delta is larger"):
        sweep(pair().aligned, pair().finetuned, tmp_path / "out", store=store, limits=[1e-9])


@pytest.mark.parametrize("work", [partial(restore, config=HALF), partial(sweep, limits=[1e-3])])
def test_a_result_is_of_one_store(store, tmp_path, work):
    """The store is written to, or given another time, in the middle."""
    (shard,) = store.folder.glob("curvature-*.safetensors")

    def touch(event):
        if event.stage in ("restore", "measure"):
            os.utime(shard, (1, 1))

    with pytest.raises(DeltaguardError, match=rf"{shard.name} was written to"):
        work(pair().aligned, pair().finetuned, tmp_path / "out", store=store, progress=touch)
    assert not list(tmp_path.glob("out/*.json"))
