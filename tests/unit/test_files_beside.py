"""Files that other processes write for a writer: adopted, taken over after a kill, and never mixed up."""

import json

import pytest

from copies import INDEX, Stop, check_complete, report_of, write_all, write_shard, writer_refusal
from deltaguard.errors import DeltaguardError
from deltaguard.models.admission import WriteRequest, check_output
from deltaguard.models.staging import StagedFiles
from deltaguard.models.writer import CheckpointWriter


def staging(out):
    return out / ".deltaguard-partial"


def beside(out, number=1, plan_hash="plan"):
    return StagedFiles.beside(out, number=number, plan_hash=plan_hash)


def left_by_two(source, out, **options):
    """What a run leaves that is killed when this process has finished a file, and another the two others."""
    with pytest.raises(Stop), CheckpointWriter(out, plan_hash="plan", **options) as writer:  # noqa: PT012
        write_shard(writer, source, source.shards[0])
        with beside(out) as files:
            for shard in source.shards[1:]:
                write_shard(files, source, shard)
        raise Stop
    return staging(out) / "journal-1.jsonl"


def test_files_of_several_processes_make_one_checkpoint(source, tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, plan_hash="plan") as writer:
        for number, shard in enumerate(source.shards[1:], start=1):
            with beside(out, number) as files:
                write_shard(files, source, shard)
                (record,) = files.records.values()
            assert writer.finished(shard) is None
            writer.adopt(record)
            assert writer.finished(shard) == record
        write_shard(writer, source, source.shards[0])
        writer.copy(source.folder / "config.json", "config.json")
        writer.copy(source.folder / INDEX, INDEX)
        writer.text("deltaguard_report.json", report_of(sorted(writer.records)))
        writer.commit(last=INDEX)
    check_complete(source, out)


@pytest.mark.parametrize("cut", [False, True])
def test_what_others_finished_before_a_kill_is_not_written_again(source, tmp_path, cut):
    out = tmp_path / "out"
    journal = left_by_two(source, out)
    again = []
    if cut:
        journal.write_bytes(journal.read_bytes()[:-5])
        again = [source.shards[-1]]
    request, size = WriteRequest((), "plan", resume=True), 1 << 20
    finished = {shard: (staging(out) / "files" / shard).stat().st_size for shard in source.shards}
    left = check_output(out, request, protected=(), needed=size)
    assert left == size - sum(each for shard, each in finished.items() if shard not in again)
    with CheckpointWriter(out, plan_hash="plan", resume=True):
        assert not journal.exists()
    assert write_all(source, out, resume=True) == again
    check_complete(source, out)


def test_a_file_that_is_gone_or_shorter_is_written_again(source, tmp_path):
    out = tmp_path / "out"
    left_by_two(source, out)
    (staging(out) / "files" / source.shards[1]).write_bytes(b"")
    (staging(out) / "files" / source.shards[2]).unlink()
    assert write_all(source, out, resume=True) == [*source.shards[1:]]
    check_complete(source, out)


@pytest.mark.parametrize(
    ("line", "content", "said"),
    [
        (1, {"plan_hash": "another", "replaces": None}, "it is of the plan another"),
        (2, {"finished": 3}, "line 2"),
        (2, {"finished": {"name": "../x", "bytes": 1, "sha256": "0" * 64}}, "no name for a file"),
    ],
)
def test_progress_of_others_that_is_damaged_is_one_message(source, tmp_path, line, content, said):
    out = tmp_path / "out"
    journal = left_by_two(source, out)
    lines = journal.read_text().splitlines()
    lines[line - 1] = json.dumps(content)
    journal.write_text("\n".join(lines) + "\n")
    message = writer_refusal(out, resume=True)
    assert said in message
    assert "journal-1.jsonl" in message
    assert "--overwrite and without --resume" in message
    assert write_all(source, out, overwrite=True) == [*source.shards]
    check_complete(source, out)


def test_over_an_earlier_output_damaged_progress_of_others_hides_nothing(source, tmp_path):
    out = tmp_path / "out"
    write_all(source, out)
    journal = left_by_two(source, out, overwrite=True)
    # Only the first journal knows then what may be replaced.
    (out / "deltaguard_report.json").unlink()
    journal.write_text("{\n")
    assert write_all(source, out, overwrite=True) == [*source.shards]
    check_complete(source, out)


def test_a_link_in_the_place_of_their_progress_is_refused_and_not_followed(source, tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.write_text("mine")
    journal = left_by_two(source, out)
    journal.unlink()
    journal.symlink_to(mine)
    assert "is a link" in writer_refusal(out, resume=True)
    write_all(source, out, overwrite=True)
    assert mine.read_text() == "mine"


def test_no_other_run_begins_while_they_are_at_work(source, tmp_path):
    out = tmp_path / "out"
    left_by_two(source, out)
    with beside(out, 1), beside(out, 2):
        for options in ({"resume": True}, {"overwrite": True}):
            assert f"Another process is working in {out}" in writer_refusal(out, **options)
    write_all(source, out, resume=True)


def test_a_run_that_finished_nothing_leaves_nothing_but_what_others_did(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop), CheckpointWriter(out, plan_hash="plan"), beside(out):
        raise Stop
    assert not out.exists()
    with pytest.raises(Stop), CheckpointWriter(out, plan_hash="plan"), beside(out) as files:  # noqa: PT012
        write_shard(files, source, source.shards[0])
        raise Stop
    assert write_all(source, out, resume=True) == [*source.shards[1:]]
    check_complete(source, out)


def test_a_file_that_is_not_what_its_process_said_is_not_adopted(source, tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, plan_hash="plan") as writer:
        with beside(out) as files:
            write_shard(files, source, source.shards[0])
        record = files.finished(source.shards[0])
        (staging(out) / "files" / source.shards[0]).write_bytes(b"short")
        with pytest.raises(DeltaguardError, match="has 5 bytes, and the process that wrote it said"):
            writer.adopt(record)
        (staging(out) / "files" / source.shards[0]).unlink()
        with pytest.raises(DeltaguardError, match="cannot be written"):
            writer.adopt(record)
