"""The writer of checkpoint folders: what it refuses, what it leaves behind, and what it resumes."""

import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaguard import durable
from deltaguard.checkpoint import Checkpoint
from deltaguard.errors import DeltaguardError
from deltaguard.writer import CheckpointWriter
from models import save, tiny_model

INDEX = "model.safetensors.index.json"


class Stop(Exception):  # noqa: N818
    """Ends a run in the middle."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "model"
    return Checkpoint.open(save(tiny_model("llama"), folder, dtype=torch.bfloat16, max_shard_size="40KB"))


def write_shard(writer, source, shard, *, until=None):
    with writer.shard(shard, source.header(shard)) as file:
        for info in source.tensors.values():
            if info.shard == shard:
                if info.name == until:
                    raise Stop
                file.write(info.name, source.read(info.name))
        file.notes = [{"shard": shard, "cost": 0.1}]


def write_all(source, out, **options):
    """Write a copy, skipping what a resumed run finished; the names of the shards that were written."""
    written = []
    with CheckpointWriter(out, plan_hash="plan", **options) as writer:
        for shard in source.shards:
            if writer.finished(shard) is None:
                write_shard(writer, source, shard)
                written.append(shard)
        writer.copy(source.folder / "config.json", "config.json")
        writer.copy(source.folder / INDEX, INDEX)
        writer.text("deltaguard_report.json", "{}")
        writer.commit(last=INDEX)
    return written


def stop_in_shard(source, out, number, *, kind=Stop, **options):
    """A run that stops in the middle of a shard."""
    with pytest.raises(kind), CheckpointWriter(out, plan_hash="plan", **options) as writer:  # noqa: PT012
        for shard in source.shards[:number]:
            write_shard(writer, source, shard)
        with writer.shard(source.shards[number], source.header(source.shards[number])):
            raise kind


def check_complete(source, out, *, extra=()):
    expected = {*source.shards, INDEX, "config.json", "deltaguard_report.json", *extra}
    assert {path.name for path in out.iterdir()} == expected
    for name in (*source.shards, INDEX, "config.json"):
        assert (out / name).read_bytes() == (source.folder / name).read_bytes()


def refusal(out, **options) -> str:
    with pytest.raises(DeltaguardError) as error:
        CheckpointWriter(out, **{"plan_hash": "plan", **options})
    return str(error.value)


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Writing


def test_a_copy_is_equal_byte_for_byte(source, tmp_path):
    write_all(source, tmp_path / "out", protected=(source.folder,))
    check_complete(source, tmp_path / "out")


def test_nothing_is_in_the_output_folder_before_the_commit(source, tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, plan_hash="plan") as writer:
        write_shard(writer, source, source.shards[0])
        writer.text("config.json", "{}")
        assert {path.name for path in out.iterdir()} == {".deltaguard-partial"}
        with pytest.raises(DeltaguardError):
            Checkpoint.open(out)


@pytest.mark.parametrize("size", [0, 5, (1 << 20) - 1, 1 << 20, (20 << 20) + 3])
def test_the_recorded_hash_is_that_of_the_file(tmp_path, size):
    content = torch.randint(0, 255, (size,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "blob").write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    with CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer:
        record = writer.copy(tmp_path / "link", "folder/copy", notes=3)
        assert (record.bytes, record.sha256, record.notes) == (size, hashlib.sha256(content).hexdigest(), 3)
        writer.commit(last="folder/copy")
    assert (tmp_path / "out" / "folder" / "copy").read_bytes() == content
    assert not (tmp_path / "out" / "folder" / "copy").is_symlink()


def test_large_and_small_tensors_are_hashed_in_order(tmp_path):
    tensors = {
        "big": torch.randn(1100, 1100).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor(True),
        "large": torch.randn(700, 700).T,
        "small": torch.randn(3),
    }
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    with CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer:
        with writer.shard("model.safetensors", checkpoint.header("model.safetensors")) as shard:
            for name in checkpoint.tensors:
                shard.write(name, tensors[name])
        content = (folder / "model.safetensors").read_bytes()
        assert writer.records["model.safetensors"].sha256 == hashlib.sha256(content).hexdigest()
        writer.commit(last="model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == content


def test_a_tensor_out_of_place_is_refused(source, tmp_path):
    shard = source.shards[0]
    first, second = [info.name for info in source.tensors.values() if info.shard == shard][:2]
    tensor = source.read(first)
    for name, wrong in ((second, source.read(second)), (first, tensor.float()), (first, tensor[:1])):
        with (
            pytest.raises(ValueError, match="header of the shard"),
            CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer,
            writer.shard(shard, source.header(shard)) as file,
        ):
            file.write(name, wrong)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_lacks_tensors_or_has_too_many_is_refused(source, tmp_path):
    shard = source.shards[0]
    infos = [info for info in source.tensors.values() if info.shard == shard]
    with CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer:
        with (
            pytest.raises(ValueError, match=f"ends before .*{infos[1].name}"),
            writer.shard(shard, source.header(shard)) as file,
        ):
            file.write(infos[0].name, source.read(infos[0].name))
        assert writer.finished(shard) is None
        with writer.shard(shard, source.header(shard)) as file:
            for info in infos:
                file.write(info.name, source.read(info.name))
            with pytest.raises(ValueError, match="has None"):
                file.write(infos[0].name, source.read(infos[0].name))
        with pytest.raises(ValueError, match="was not written"):
            writer.commit(last="model.safetensors.index.json")


@pytest.mark.parametrize("name", ["../escape", "/escape", "a/../../b", "", ".deltaguard-partial/x"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    with (
        pytest.raises(DeltaguardError, match="no name for a file"),
        CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer,
    ):
        writer.text(name, "")


# Failing and resuming


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_a_run_that_stopped_is_resumed(source, tmp_path, kind):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2, kind=kind)
    assert {path.name for path in (out / ".deltaguard-partial/files").iterdir()} == set(source.shards[:2])
    assert write_all(source, out, resume=True) == list(source.shards[2:])
    check_complete(source, out)


def test_records_and_notes_survive(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 1)
    with CheckpointWriter(tmp_path / "out", plan_hash="plan", resume=True) as writer:
        record = writer.finished(source.shards[0])
        content = (source.folder / source.shards[0]).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert record.notes == [{"shard": source.shards[0], "cost": 0.1}]
        assert writer.finished(source.shards[1]) is None


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("existing", ["", "a", "a/b", "a/b/out"])
def test_a_run_that_finished_nothing_leaves_nothing(source, tmp_path, existing, kind):
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    before = everything_under(tmp_path)
    stop_in_shard(source, tmp_path / "a/b/out", 0, kind=kind)
    assert everything_under(tmp_path) == before


def test_resuming_where_nothing_is_staged_starts(source, tmp_path):
    assert write_all(source, tmp_path / "out", resume=True) == list(source.shards)
    check_complete(source, tmp_path / "out")


def test_a_finished_folder_cannot_be_resumed(source, tmp_path):
    write_all(source, tmp_path / "out")
    message = refusal(tmp_path / "out", resume=True)
    assert "nothing to resume" in message
    assert "--overwrite" in message


def test_another_plan_cannot_be_resumed(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 1)
    message = refusal(tmp_path / "out", plan_hash="other", resume=True)
    assert "(plan; this one is other)" in message
    assert write_all(source, tmp_path / "out", resume=True) == list(source.shards[1:])


def test_a_file_may_be_written_again(source, tmp_path):
    with CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer:
        writer.text("deltaguard_report.json", "old")
        with pytest.raises(DeltaguardError, match="cannot be written"):
            writer.copy(tmp_path / "absent", "deltaguard_report.json")
        writer.text("deltaguard_report.json", "new")
        writer.commit(last="deltaguard_report.json")
    assert (tmp_path / "out" / "deltaguard_report.json").read_text() == "new"


@pytest.mark.parametrize("tear", [1, 20])
def test_a_journal_that_was_cut_off_loses_its_last_line_only(source, tmp_path, tear):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2)
    journal = out / ".deltaguard-partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-tear])
    assert write_all(source, out, resume=True) == list(source.shards[1:])
    check_complete(source, out)


def test_a_journal_that_was_never_begun_is_started_anew(source, tmp_path):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2)
    (out / ".deltaguard-partial" / "journal.jsonl").write_bytes(b'{"plan')
    assert write_all(source, out, resume=True) == list(source.shards)
    check_complete(source, out)


def test_a_spoiled_journal_is_an_error(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 2)
    journal = tmp_path / "out" / ".deltaguard-partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"finished"', b'"finished', 1))
    assert "--overwrite" in refusal(tmp_path / "out", resume=True)


def test_staged_files_that_are_gone_or_shorter_are_written_again(source, tmp_path):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2)
    staged = out / ".deltaguard-partial" / "files"
    (staged / source.shards[0]).unlink()
    (staged / source.shards[1]).write_bytes(b"short")
    assert write_all(source, out, resume=True) == list(source.shards)
    check_complete(source, out)


# The output folder


def test_a_folder_with_content_is_refused(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = refusal(tmp_path)
    assert "notes.txt" in message
    assert "--overwrite" in message
    assert "--resume" not in message


def test_an_unfinished_run_is_named(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 1)
    message = refusal(tmp_path / "out")
    assert "--resume" in message
    assert "--overwrite" in message


def test_overwriting_replaces_the_old_checkpoint_at_the_commit_only(source, tmp_path):
    out = tmp_path / "out"
    save(tiny_model("qwen3"), out, max_shard_size="20KB")
    (out / "deltaguard_report.json").write_text("old")
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    stop_in_shard(source, out, 2, overwrite=True)
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert write_all(source, out, resume=True) == list(source.shards[2:])
    others = {path.name for path in before if "safetensors" not in path.name}
    check_complete(source, out, extra=others)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "deltaguard_report.json").read_text() == "{}"


def test_overwriting_discards_what_was_staged(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 2)
    assert write_all(source, tmp_path / "out", overwrite=True) == list(source.shards)
    check_complete(source, tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_inputs_are_never_written_into(source, tmp_path, options):
    inputs = tmp_path / "models" / "aligned"
    inputs.mkdir(parents=True)
    (tmp_path / "link").symlink_to(inputs)
    for out in (
        inputs,
        inputs / "restored",
        tmp_path / "models",
        tmp_path / "link",
        tmp_path / "link" / "new",
    ):
        assert "choose another output folder" in refusal(out, protected=(inputs,), **options)
    assert "choose another" in refusal(inputs, protected=(tmp_path / "link",), **options)
    assert everything_under(tmp_path) == {"models", "models/aligned", "link"}


def test_a_sibling_of_an_input_is_no_input(source, tmp_path):
    (tmp_path / "model").mkdir()
    with CheckpointWriter(tmp_path / "model-restored", plan_hash="plan", protected=(tmp_path / "model",)):
        pass


# What the operating system refuses


def test_too_little_space_is_known_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    with CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer:
        writer.require_space(1_000)
        with pytest.raises(DeltaguardError, match="needs 1,001 bytes, and 1,000 are free"):
            writer.require_space(1_001)
        record = writer.text("config.json", "{}")
        writer.require_space(1_000 + record.bytes)


def test_a_full_disk_leaves_what_was_finished(source, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointWriter(out, plan_hash="plan") as writer:
        write_shard(writer, source, source.shards[0])
        monkeypatch.setattr(durable.os, "fsync", full)
        with pytest.raises(DeltaguardError, match="no space left") as error:
            write_shard(writer, source, source.shards[1])
    monkeypatch.undo()
    size = (source.folder / source.shards[1]).stat().st_size
    assert f"{out / source.shards[1]}: {size:,} bytes are needed" in str(error.value)
    assert "--resume" in str(error.value)
    assert {path.name for path in (out / ".deltaguard-partial/files").iterdir()} == {source.shards[0]}
    assert write_all(source, out, resume=True) == list(source.shards[1:])
    check_complete(source, out)


def test_a_disk_that_is_really_full(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(DeltaguardError, match="no space left"):
            write_all(source, disk / "out")
        staged = {path.name for path in (disk / "out/.deltaguard-partial/files").iterdir()}
        assert staged == {source.shards[0]}
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert write_all(source, disk / "out", resume=True) == list(source.shards[1:])
        check_complete(source, disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.EIO, os.strerror(errno.EIO))],
)
def test_a_folder_that_cannot_be_made_is_explained(tmp_path, monkeypatch, number, word):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = refusal(tmp_path / "out")
    assert word in message
    assert str(tmp_path / "out") in message


@pytest.mark.parametrize("name", ["file", "file/out", "file/deeper/out"])
def test_a_file_in_the_way_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / name, overwrite=True)
    assert f"{tmp_path / 'file'} is a file, not a folder" in message


def test_what_was_written_loads(source, tmp_path):
    write_all(source, tmp_path / "out")
    copy = Checkpoint.open(tmp_path / "out")
    assert copy.fingerprint() == source.fingerprint()
    assert {name for shard in copy.shards for name in load_file(copy.folder / shard)} == set(source.tensors)
