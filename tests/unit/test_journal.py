"""Progress on disk that is damaged: one message that says what and how to start anew, and nothing is lost."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from copies import INDEX, check_complete, everything_under, stop_in_shard, write_all, writer_refusal
from deltaguard.errors import DeltaguardError
from deltaguard.models.journal import Journal
from deltaguard.models.writer import CheckpointWriter

HASH = "0" * 64
RECORD = {"name": "model.safetensors", "bytes": 1, "sha256": HASH, "notes": None}


def journal_of(folder):
    return folder / ".deltaguard-partial" / "journal.jsonl"


def damage(folder, line, content):
    """Put something into the place of a line, counted from 1."""
    path = journal_of(folder)
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [content if isinstance(content, str) else json.dumps(content)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "content", "said"),
    [
        (2, "not json", "line 2: Invalid JSON"),
        (2, "\x00", "line 2: Invalid JSON"),
        (2, [], "line 2: Input should be an object (it is [])"),
        (2, {"unknown": 1}, "`unknown`: Extra inputs are not permitted"),
        (2, {"finished": 3}, "finished"),
        (2, {"finished": RECORD | {"bytes": -1}}, "greater than or equal to 0 (it is -1)"),
        (2, {"finished": RECORD | {"bytes": "1"}}, "valid integer (it is '1')"),
        (2, {"finished": RECORD | {"bytes": True}}, "valid integer (it is True)"),
        (2, {"finished": RECORD | {"sha256": "0"}}, "sha256"),
        (2, {"finished": RECORD | {"name": "../../thesis.txt"}}, "'../../thesis.txt' is no name for a file"),
        (2, {"finished": RECORD | {"name": "/etc/passwd"}}, "no name for a file"),
        (2, {"finished": RECORD | {"more": 1}}, "more"),
        (2, {"begun": "../x"}, "no name for a file"),
        (2, {}, "line 2: this is no line of a run's progress"),
        (2, {"begun": None}, "no line of a run's progress"),
        (2, {"begun": "x", "committing": True}, "no line of a run's progress"),
        (2, {"remembered": [1]}, "remembered"),
        (2, {"committing": False}, "committing"),
        (2, {"plan_hash": "plan", "replaces": None}, "line 2: a run begins in the first line"),
        (1, {"begun": "x"}, "line 1: a run begins in the first line"),
        (1, {"plan_hash": "plan"}, "no line of a run's progress"),
        (1, {"plan_hash": 1, "replaces": None}, "plan_hash"),
        (1, {"plan_hash": "plan", "replaces": ["../../thesis.txt"]}, "no name for a file"),
    ],
)
def test_damaged_progress_is_one_message_and_nothing_is_lost(source, tmp_path, line, content, said):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2)
    damage(out, line, content)
    before = everything_under(out)
    message = writer_refusal(out, resume=True)
    assert str(journal_of(out)) in message
    assert said in message
    assert "--overwrite and without --resume" in message
    assert everything_under(out) == before
    write_all(source, out, overwrite=True)
    check_complete(source, out)


def test_damaged_progress_over_an_earlier_output_leaves_that_whole(source, tmp_path):
    out = tmp_path / "out"
    write_all(source, out)
    stop_in_shard(source, out, 1, overwrite=True)
    damage(out, 2, "{")
    assert "--overwrite" in writer_refusal(out, resume=True)
    shutil.rmtree(out / ".deltaguard-partial")
    check_complete(source, out)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "a", None, [1], {"a": 1}])
def test_what_was_remembered_or_noted_must_be_what_the_reader_expects(tmp_path, value):
    numbers = TypeAdapter(float)
    with CheckpointWriter(tmp_path / "out", plan_hash="plan") as writer:
        writer.text("config.json", "{}", notes=1.5)
        writer.remember("price", 0.5)
    path = journal_of(tmp_path / "out")
    path.write_text(path.read_text().replace("0.5", json.dumps(value)).replace("1.5", json.dumps(value)))
    with CheckpointWriter(tmp_path / "out", plan_hash="plan", resume=True) as writer:
        if value is None:
            assert writer.remembered("price", numbers) is None
        else:
            with pytest.raises(DeltaguardError, match=r"(?s)journal.jsonl .* as price: .*--overwrite"):
                writer.remembered("price", numbers)
        with pytest.raises(DeltaguardError, match=r"(?s)noted about config.json: .*--overwrite"):
            writer.notes(writer.finished("config.json"), numbers)


@pytest.fixture(scope="module")
def begun(source, tmp_path_factory):
    """An interrupted run over an earlier output, and one that was interrupted in its commit."""
    root = tmp_path_factory.mktemp("begun")
    write_all(source, root / "staged")
    stop_in_shard(source, root / "staged", 2, overwrite=True)
    write_all(source, root / "moving")
    (root / "moving" / INDEX).rename(root / "moving" / "old.index")
    with CheckpointWriter(root / "moving", plan_hash="plan", overwrite=True) as writer:
        writer.text("a.txt", "a")
        writer.text("b.txt", "b")
        writer._journal.commit()
        writer._move("a.txt")
    return root


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(
        ["../../thesis.txt", "/etc/passwd", "a.txt", "a/b", "\0", ".deltaguard-partial", "x" * 5000]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["staged", "moving"])
def test_whatever_a_journal_holds_it_is_read_or_refused(begun, tmp_path, name, data):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    out = tmp_path / "a" / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(begun / name, out)
    lines = journal_of(out).read_bytes().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        line = bytearray(lines[number])
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
        lines[number] = bytes(line)
    else:
        lines[number] = json.dumps(_changed(json.loads(lines[number]), data)).encode()
    journal_of(out).write_bytes(b"\n".join(lines) + b"\n")
    try:
        with CheckpointWriter(out, plan_hash="plan", resume=True) as writer:
            writer.text("a.txt", "new")
            writer.commit(last="a.txt")
    except DeltaguardError as error:
        assert "overwrite" in str(error) or "another output folder" in str(error)  # noqa: PT017
    assert thesis.read_text() == "years of work"


def _changed(document, data):
    """The document with another value somewhere in it."""
    if isinstance(document, dict) and document and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(document)))
        return document | {key: _changed(document[key], data)}
    if isinstance(document, list) and document and data.draw(st.booleans()):
        index = data.draw(st.integers(0, len(document) - 1))
        return [*document[:index], _changed(document[index], data), *document[index + 1 :]]
    return data.draw(JSON)


def test_a_journal_that_is_a_folder_is_explained(source, tmp_path):
    (journal_of(tmp_path / "out")).mkdir(parents=True)
    assert "no regular file" in writer_refusal(tmp_path / "out", resume=True)
    assert Journal.load(tmp_path / "absent") is None
