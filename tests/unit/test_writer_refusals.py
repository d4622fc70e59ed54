"""Where the writer refuses to write, and how it explains what the operating system refuses."""

import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from copies import (
    check_complete,
    everything_under,
    report_of,
    stop_in_shard,
    write_all,
    write_shard,
    writer_refusal,
)
from deltaguard.errors import DeltaguardError
from deltaguard.models import durable
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.writer import CheckpointWriter
from models import save, tiny_model


def test_a_folder_with_content_is_refused(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = writer_refusal(tmp_path)
    assert "notes.txt" in message
    assert "--overwrite" in message
    assert "--resume" not in message


def test_an_unfinished_run_is_named(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 1)
    message = writer_refusal(tmp_path / "out")
    assert "--resume" in message
    assert "--overwrite" in message


def test_overwriting_replaces_the_old_checkpoint_at_the_commit_only(source, tmp_path):
    out = tmp_path / "out"
    save(tiny_model("qwen3"), out, max_shard_size="20KB")
    (out / "deltaguard_report.json").write_text(report_of(path.name for path in out.iterdir()))
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    stop_in_shard(source, out, 2, overwrite=True)
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert write_all(source, out, resume=True) == list(source.shards[2:])
    check_complete(source, out, extra={"notes.txt"})
    assert (out / "notes.txt").read_text() == "mine"


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
        assert "choose another output folder" in writer_refusal(out, protected=(inputs,), **options)
    assert "choose another" in writer_refusal(inputs, protected=(tmp_path / "link",), **options)
    assert everything_under(tmp_path) == {"models", "models/aligned", "link"}


def test_a_sibling_of_an_input_is_no_input(source, tmp_path):
    (tmp_path / "model").mkdir()
    sibling = tmp_path / "model-restored"
    with CheckpointWriter(sibling, plan_hash="plan", protected=(tmp_path / "model",)) as writer:
        writer.text("model.safetensors.index.json", "{}")
        writer.commit("model.safetensors.index.json")
    assert [path.name for path in sibling.iterdir()] == ["model.safetensors.index.json"]


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


def test_what_fails_while_a_large_file_is_flushed_beside_the_work_is_told(tmp_path, monkeypatch):
    real = durable.os.fsync

    def full(descriptor):
        if threading.current_thread().name.startswith("flusher"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    (tmp_path / "large").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(durable.os, "fsync", full)
    with (
        CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer,
        pytest.raises(DeltaguardError, match=r"no space left for .*large: 3,145,728 bytes"),
    ):
        writer.copy(tmp_path / "large", "large")
    assert not (tmp_path / "out").exists()


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
    message = writer_refusal(tmp_path / "out")
    assert word in message
    assert str(tmp_path / "out") in message


@pytest.mark.parametrize("name", ["file", "file/out", "file/deeper/out"])
def test_a_file_in_the_way_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    message = writer_refusal(tmp_path / name, overwrite=True)
    assert f"{tmp_path / 'file'} is a file, not a folder" in message


def test_what_was_written_loads(source, tmp_path):
    write_all(source, tmp_path / "out")
    copy = Checkpoint.open(tmp_path / "out")
    assert copy.fingerprint() == source.fingerprint()
    assert {name for shard in copy.shards for name in load_file(copy.folder / shard)} == set(source.tensors)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_two_runs_never_write_to_one_folder_at_once(source, tmp_path, options):
    out = tmp_path / "out"
    with CheckpointWriter(out, plan_hash="plan") as writer:
        write_shard(writer, source, source.shards[0])
        before = everything_under(out)
        with pytest.raises(DeltaguardError, match="Another process is working"):
            CheckpointWriter(out, plan_hash="plan", **options)
        assert everything_under(out) == before
    with CheckpointWriter(out, plan_hash="plan", resume=True) as writer:
        assert writer.finished(source.shards[0])
