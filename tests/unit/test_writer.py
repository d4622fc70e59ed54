"""The writer of checkpoint folders: what it writes, what it leaves behind, and what it resumes."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from copies import (
    Stop,
    check_complete,
    everything_under,
    report_of,
    stop_in_shard,
    write_all,
    write_shard,
    writer_refusal,
)
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.writer import CheckpointWriter
from deltaguard.reports.records.restore import REPORT_NAME


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


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_a_run_that_stopped_is_resumed(source, tmp_path, kind):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2, kind=kind)
    assert {path.name for path in (out / ".deltaguard-partial/files").iterdir()} == set(source.shards[:2])
    assert write_all(source, out, resume=True) == list(source.shards[2:])
    check_complete(source, out)


def test_a_resume_that_fails_at_once_loses_nothing(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2)

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "rglob", refuse)
    assert "permission denied" in writer_refusal(out, resume=True)
    monkeypatch.undo()
    assert write_all(source, out, resume=True) == list(source.shards[2:])


def test_what_came_into_an_empty_folder_meanwhile_is_named_and_stays(source, tmp_path):
    out = tmp_path / "out"
    stop_in_shard(source, out, 1)
    (out / "notes.txt").write_text("years of work")
    before = everything_under(out)
    message = writer_refusal(out, resume=True)
    assert "notes.txt" in message
    assert "beside the progress of this run" in message
    assert everything_under(out) == before
    (out / "notes.txt").unlink()
    write_all(source, out, resume=True)
    check_complete(source, out)


def test_a_name_is_given_to_what_is_on_disk_and_is_itself_at_once(source, tmp_path, monkeypatch):
    """A power cut then leaves no file with its name and not its content, or with a record and no name."""
    steps, rename = [], Path.replace

    def flushed(descriptor):
        steps.append(("flush", os.fstat(descriptor).st_ino))

    def renamed(path, target):
        held = path.stat().st_ino
        found = rename(path, target)
        steps.append(("rename", held, Path(target).parent.stat().st_ino))
        return found

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write_all(source, tmp_path / "out")
    seen = [step[0] for step in steps].count("rename")
    # Each file is renamed when it is whole, and once more by the commit.
    assert seen >= 2 * (len(source.shards) + 3)
    ever = set()
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if step[0] == "flush":
            ever.add(step[1])
        else:
            _, file, folder = step
            assert file in ever
            assert after == ("flush", folder)


def test_records_and_notes_survive(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 1)
    with CheckpointWriter(tmp_path / "out", plan_hash="plan", resume=True) as writer:
        record = writer.finished(source.shards[0])
        content = (source.folder / source.shards[0]).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert record.notes == [{"shard": source.shards[0], "cost": 0.1}]
        assert writer.finished(source.shards[1]) is None


ANYTHING = TypeAdapter(Any)
FOUND = {"mu": 0.1, "probes": [1e-4, None], "why": "é"}


def stop_after_finding_out(out, kind=Stop, **options):
    with pytest.raises(kind), CheckpointWriter(out, plan_hash="plan", **options) as writer:  # noqa: PT012
        writer.remember("price", "old")
        writer.remember("price", FOUND)
        raise kind


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_what_was_found_out_survives_without_a_finished_file(source, tmp_path, kind):
    out = tmp_path / "out"
    stop_after_finding_out(out, kind)
    assert [path.name for path in out.iterdir()] == [".deltaguard-partial"]
    assert "--resume" in writer_refusal(out)
    assert "(plan; this one is other)" in writer_refusal(out, plan_hash="other", resume=True)
    with CheckpointWriter(out, plan_hash="plan", resume=True) as writer:
        assert writer.remembered("price", ANYTHING) == FOUND
        assert writer.remembered("cost", ANYTHING) is None
    assert write_all(source, out, resume=True) == list(source.shards)
    check_complete(source, out)


def test_what_was_found_out_is_forgotten_by_a_run_that_starts_anew(source, tmp_path):
    stop_after_finding_out(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", plan_hash="plan", overwrite=True) as writer:
        assert writer.remembered("price", ANYTHING) is None
        writer.remember("price", FOUND)
        writer.discard()
    assert not list(tmp_path.rglob("*.jsonl"))


def test_nothing_is_left_of_a_run_that_is_discarded(tmp_path):
    with CheckpointWriter(tmp_path / "a" / "out", plan_hash="plan") as writer:
        writer.remember("price", FOUND)
        writer.text("config.json", "{}")
        writer.discard()
    assert everything_under(tmp_path) == set()


def test_of_a_run_that_is_discarded_only_what_may_be_replaced_is_known_where_the_report_is_gone(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, plan_hash="earlier") as writer:
        writer.text("config.json", "{}")
        writer.text(REPORT_NAME, report_of(["config.json"]))
        writer.commit(REPORT_NAME)
    with CheckpointWriter(out, plan_hash="plan", overwrite=True) as writer:
        writer.remember("price", FOUND)
        writer.text("config.json", '{"a": 1}')
        (out / REPORT_NAME).unlink()
        writer.discard()
    with CheckpointWriter(out, plan_hash="plan", resume=True) as writer:
        assert not writer.records
        assert writer.remembered("price", ANYTHING) is None
        writer.text("config.json", '{"b": 1}')
        writer.commit("config.json")
    assert (out / "config.json").read_text() == '{"b": 1}'
    assert not list(out.glob(".deltaguard-partial"))


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
    message = writer_refusal(tmp_path / "out", resume=True)
    assert "nothing to resume" in message
    assert "--overwrite" in message


def test_another_plan_cannot_be_resumed(source, tmp_path):
    stop_in_shard(source, tmp_path / "out", 1)
    message = writer_refusal(tmp_path / "out", plan_hash="other", resume=True)
    assert "(plan; this one is other)" in message
    assert write_all(source, tmp_path / "out", resume=True) == list(source.shards[1:])


def test_a_file_may_be_written_again(source, tmp_path):
    with CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer:
        writer.text("deltaguard_report.json", "old")
        with pytest.raises(DeltaguardError, match="cannot be read"):
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
    assert "--overwrite" in writer_refusal(tmp_path / "out", resume=True)


def test_staged_files_that_are_gone_or_shorter_are_written_again(source, tmp_path):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2)
    staged = out / ".deltaguard-partial" / "files"
    (staged / source.shards[0]).unlink()
    (staged / source.shards[1]).write_bytes(b"short")
    assert write_all(source, out, resume=True) == list(source.shards)
    check_complete(source, out)
