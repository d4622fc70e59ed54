"""What is kept between two prices comes back as it was, wherever there was room for it."""

import shutil
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deltaguard.restoration.kept import Kept


@dataclass(frozen=True)
class Inner:
    name: str
    vectors: Tensor


@dataclass(frozen=True)
class Value:
    matrix: Tensor
    inner: Inner
    nothing: Tensor | None = None
    several: tuple[Inner | Tensor, ...] = ()


def value(seed=0, dtype=torch.float32):
    made = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Value(made.T, Inner("layer", torch.arange(7)), several=(made, Inner("other", made[0])))


def check_same(found, expected):
    assert torch.equal(found.matrix, expected.matrix)
    assert torch.equal(found.inner.vectors, expected.inner.vectors)
    assert torch.equal(found.several[0], expected.several[0])
    assert torch.equal(found.several[1].vectors, expected.several[1].vectors)
    assert (found.matrix.dtype, found.inner.name, found.nothing) == (expected.matrix.dtype, "layer", None)


@pytest.mark.parametrize("memory", [0, 200, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_come_back(tmp_path, memory, dtype):
    kept = Kept(memory, tmp_path, reserve=0)
    for seed in range(5):
        kept.add(str(seed), value(seed, dtype))
    for seed in range(5):
        check_same(kept.get(str(seed)), value(seed, dtype))
    assert kept.get("other") is None
    # A file without a name: nothing is left where the process is killed.
    assert not list(tmp_path.iterdir())


def test_where_the_disk_must_stay_free_only_what_fits_the_memory_is_kept(tmp_path):
    kept = Kept(2 * value().matrix.nbytes + 7 * 8 + 5 * 4, tmp_path, reserve=1 << 62)
    kept.add("first", value())
    kept.add("second", value(1))
    check_same(kept.get("first"), value())
    assert kept.get("second") is None


def test_a_disk_that_is_full_after_all_loses_the_layer_alone(tmp_path, monkeypatch):
    kept = Kept(0, tmp_path, reserve=0)
    kept.add("first", value())

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "_write", full)
    kept.add("second", value(1))
    monkeypatch.undo()
    check_same(kept.get("first"), value())
    assert kept.get("second") is None


def test_what_a_full_disk_took_half_of_takes_no_room(tmp_path, monkeypatch):
    kept, written = Kept(0, tmp_path, reserve=0), []
    kept.add("first", value())
    write = kept._write

    def full(tensor):
        if written:
            raise OSError(28, "No space left on device")
        written.append(tensor)
        return write(tensor)

    size = kept._scratch.seek(0, 2)
    monkeypatch.setattr(kept, "_write", full)
    kept.add("second", value(1))
    assert written
    assert kept._scratch.seek(0, 2) == size


def test_room_that_somebody_else_took_meanwhile_is_given_back(tmp_path, monkeypatch):
    kept = Kept(0, tmp_path, reserve=1000)
    kept.add("first", value())
    size, free = kept._scratch.seek(0, 2), [10**6, 1000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free.pop(0)))
    kept.add("second", value(1))
    assert not free
    assert kept._scratch.seek(0, 2) == size
    assert kept.get("second") is None
    check_same(kept.get("first"), value())


def test_where_no_file_can_be_made_nothing_is_kept(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    kept = Kept(0, tmp_path, reserve=0)
    kept.add("first", value())
    assert kept.get("first") is None


def test_what_lies_in_the_file_can_be_looked_at_without_reading_it(tmp_path):
    kept = Kept(0, tmp_path, reserve=0)
    kept.add("first", value())
    assert kept.peek("first").matrix.is_meta
    assert kept.peek("first").inner.name == "layer"
    assert kept.peek("other") is None
