"""The lazy view of a checkpoint: what is read, and how models are told apart."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint, content_fingerprint
from deltaguard.models.families import ties_embeddings
from deltaguard.models.shards import DTYPES
from folders import two_shards, write
from models import DENSE, save, tiny_model


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("code", [code for code in DTYPES if not code.startswith("F8_")])
def test_every_dtype_is_read_as_stored(tmp_path, code):
    dtype = DTYPES[code]
    data = bytes(i % 2 for i in range(6 * dtype.itemsize))
    shapes = {"matrix": [3, 2], "number": [], "empty": [0, 4]}
    header, offset, payload = {}, 0, b""
    for name, shape in shapes.items():
        part = data[: torch.Size(shape).numel() * dtype.itemsize]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + len(part)]}
        offset += len(part)
        payload += part
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + payload)
    checkpoint = Checkpoint.open(tmp_path)
    for name, shape in shapes.items():
        tensor = checkpoint.read(name)
        assert (tensor.dtype, list(tensor.shape)) == (dtype, shape)
        assert as_bytes(tensor) == data[: checkpoint.tensors[name].nbytes]


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_reads_what_safetensors_reads(tmp_path, architecture, shard_size):
    save(tiny_model(architecture), tmp_path, dtype=torch.bfloat16, max_shard_size=shard_size)
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.index_name is None) == (shard_size == "5GB")
    order = []
    for shard in checkpoint.shards:
        stored = load_file(tmp_path / shard)
        order += [info.name for info in checkpoint.tensors.values() if info.shard == shard]
        assert order[-len(stored) :] == sorted(stored, key=lambda name: checkpoint.tensors[name].start)
        for name, tensor in stored.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.read(name).dtype == torch.bfloat16
        assert (tmp_path / shard).read_bytes().startswith(checkpoint.header(shard))
        assert len(checkpoint.header(shard)) == min(
            info.start for info in checkpoint.tensors.values() if info.shard == shard
        )
    assert order == list(checkpoint.tensors)


def test_a_tensor_that_was_read_belongs_to_the_reader(tmp_path):
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    checkpoint.read("a.weight").zero_()
    assert torch.equal(checkpoint.read("a.weight"), torch.ones(3, 2))


def test_reading_maps_no_file_into_memory(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    tensor = checkpoint.read("a.weight")
    assert str(tmp_path) not in maps.read_text()
    assert tensor.shape == (3, 2)


def test_threads_may_read_at_once(tmp_path):
    save(tiny_model("llama"), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    names = list(checkpoint.tensors) * 20
    with ThreadPoolExecutor(4) as pool:
        for name, tensor in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert torch.equal(tensor, expected[name])


def test_a_file_that_shrinks_while_it_is_used_is_named(tmp_path):
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    last = max(checkpoint.tensors.values(), key=lambda info: (info.shard == path.name, info.end))
    with pytest.raises(DeltaguardError, match=rf"{path.name} ends at byte"):
        checkpoint.read(last.name)


def test_a_checkpoint_goes_on_reading_the_files_that_it_found(tmp_path):
    checkpoint = Checkpoint.open(two_shards(tmp_path))
    path = tmp_path / checkpoint.tensors["a.weight"].shard
    before, fingerprint = checkpoint.read("a.weight"), checkpoint.fingerprint()
    other = tmp_path / "other"
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    assert torch.equal(checkpoint.read("a.weight"), before)
    assert content_fingerprint(checkpoint._files, checkpoint.tensors) == fingerprint
    assert checkpoint.changes() == [f"{path} was replaced by another file"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes() + b" "), "bytes and has"),
        (lambda path: os.utime(path, (1, 1)), "was written to"),
    ],
)
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json"])
def test_every_kind_of_change_is_told(tmp_path, name, change, said):
    folder = two_shards(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.changes() == []
    change(folder / name)
    assert [said in told and name in told for told in checkpoint.changes()] == [True]


def test_a_small_file_that_is_numbered_anew_is_the_same_file(tmp_path):
    """As file systems of programs do that forget which number a path had."""
    folder = two_shards(tmp_path)
    checkpoint = Checkpoint.open(folder)
    path, before = folder / "config.json", (folder / "config.json").stat()
    copy = folder / "copy"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(path)
    assert path.stat().st_ino != before.st_ino
    assert checkpoint.changes() == []
    path.unlink()
    path.write_text("{}")
    assert len(checkpoint.changes()) == 1


def test_weights_that_transformers_takes_before_others_are_refused(tmp_path):
    folder = two_shards(tmp_path)
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"x")
    with pytest.raises(DeltaguardError, match="consolidate_distributed_checkpoint"):
        Checkpoint.open(folder)


def test_what_copying_from_macos_leaves_is_no_weight(tmp_path):
    folder = two_shards(tmp_path)
    (folder / "._model-00001-of-00002.safetensors").write_bytes(b"x")
    (folder / "._model.safetensors.index.json").write_bytes(b"x")
    assert Checkpoint.open(folder).read("a.weight") is not None


def test_a_file_that_comes_later_is_told_unless_it_is_no_part_of_the_model(tmp_path):
    folder = two_shards(tmp_path)
    checkpoint = Checkpoint.open(folder)
    for name in ("optimizer.pt", "notes.txt"):
        (folder / name).write_text("")
    assert checkpoint.changes() == []
    assert "notes.txt" not in checkpoint.files()
    (folder / "chat_template.jinja").write_text("x")
    (folder / "adapter_config.json").write_text("{}")
    added = (folder / name for name in ("adapter_config.json", "chat_template.jinja"))
    assert checkpoint.changes() == [f"{path} was added" for path in added]


@pytest.mark.parametrize(
    ("config", "names", "tied"),
    [
        ({"tie_word_embeddings": True}, ["lm_head.weight"], True),
        ({"tie_word_embeddings": False}, ["embed.weight"], False),
        ({"text_config": {"tie_word_embeddings": True}}, ["lm_head.weight"], True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, ["a"], False),
        ({}, ["embed.weight"], True),
        ({}, ["embed.weight", "language_model.lm_head.weight"], False),
    ],
)
def test_tied_embeddings(tmp_path, config, names, tied):
    write(tmp_path, {"model.safetensors": {name: torch.ones(2) for name in names}}, config)
    opened = Checkpoint.open(tmp_path)
    assert ties_embeddings(opened.config, opened.tensors) is tied


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    model = tiny_model("llama")
    one = Checkpoint.open(save(model, tmp_path / "one")).fingerprint()
    assert one == Checkpoint.open(save(model, tmp_path / "sharded", max_shard_size="40KB")).fingerprint()
    assert one != Checkpoint.open(save(model, tmp_path / "half", dtype=torch.bfloat16)).fingerprint()
    assert one != Checkpoint.open(save(tiny_model("llama", seed=1), tmp_path / "other")).fingerprint()


@pytest.mark.parametrize("position", [0, 9_999, 20_000 - 1])
def test_the_fingerprint_sees_the_ends_and_the_middle_of_a_tensor(tmp_path, position):
    tensor = torch.zeros(20_000, dtype=torch.int8)
    before = Checkpoint.open(write(tmp_path, {"model.safetensors": {"a": tensor}})).fingerprint()
    tensor[position] = 1
    assert Checkpoint.open(write(tmp_path, {"model.safetensors": {"a": tensor}})).fingerprint() != before


def test_the_fingerprint_sees_all_of_a_small_tensor_and_its_name_and_shape(tmp_path):
    def fingerprint(tensors):
        return Checkpoint.open(write(tmp_path, {"model.safetensors": tensors})).fingerprint()

    different = [
        {"a": torch.zeros(12_288, dtype=torch.int8)},
        {"a": torch.zeros(12_288, dtype=torch.int8).index_fill(0, torch.tensor([5000]), 1)},
        {"b": torch.zeros(12_288, dtype=torch.int8)},
        {"a": torch.zeros(12_288, dtype=torch.uint8)},
        {"a": torch.zeros(2, 6_144, dtype=torch.int8)},
    ]
    assert len({fingerprint(tensors) for tensors in different}) == len(different)


def test_the_fingerprint_never_changes_between_versions(tmp_path):
    tensors = {"b": torch.arange(5000, dtype=torch.float32), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    checkpoint = Checkpoint.open(write(tmp_path, {"model.safetensors": tensors}))
    # Curvature stores name their model by it.
    assert checkpoint.fingerprint() == "87eac3cd24862dc8e63f5f70cbd846bc51dd316c9af0630af93777ac2c6ed18d"
