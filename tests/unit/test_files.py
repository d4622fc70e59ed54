"""The one reader: whatever a file holds, what its schema describes or one message that says what to do."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from deltaguard import files
from deltaguard.errors import MOST_PROBLEMS, DeltaguardError
from deltaguard.files import (
    ANY_OBJECT,
    MAX_YAML_BYTES,
    MAX_YAML_DEPTH,
    append_journal,
    expanded,
    parse_yaml,
    read_data,
    read_file,
    read_journal,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
)

REMEDY = "Copy it again."


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    count: int = Field(default=1, ge=1)
    parts: dict[str, list[int]] = {}


class Versioned(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: int = 3
    name: str = ""


def refused(read, *arguments, **named):
    with pytest.raises(DeltaguardError) as caught:
        read(*arguments, **named)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def written(content, name="file"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


# Files


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    # It would wait for ever.
    assert refused(read_file, path) == f"{path} is no regular file, so it is not read."


def test_a_device_and_a_folder_are_refused(tmp_path):
    assert "no regular file" in refused(read_file, tmp_path)
    assert "no regular file" in refused(read_file, os.devnull)


def test_what_cannot_be_read_says_why(tmp_path):
    assert (
        refused(read_file, tmp_path / "gone")
        == f"{tmp_path / 'gone'} cannot be read: No such file or directory."
    )
    assert "File name too long" in refused(read_file, tmp_path / ("a" * 300))
    assert "embedded null byte" in refused(read_file, tmp_path / "a\0b")


def test_a_file_that_is_too_large_is_refused_with_both_sizes(write):
    message = refused(read_file, write(b"12345"), max_bytes=4)
    assert "has 5 bytes; a file of its kind has 4 at most" in message


def test_no_descriptor_stays_open(tmp_path, write):
    path = write("{}")
    os.mkfifo(tmp_path / "pipe")
    before = len(list(Path("/dev/fd").iterdir()))
    for each in (path, tmp_path / "pipe", tmp_path, tmp_path / "gone") * 20:
        with pytest.raises(DeltaguardError):
            read_json(each, Options, remedy=REMEDY)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_text_is_utf_8_with_or_without_a_mark(write):
    assert read_text(write(b"\xef\xbb\xbfa\xc3\xa9")) == "aé"
    assert "not text in UTF-8: byte 0xff at position 1. Save it in UTF-8." in refused(
        read_text, write(b"a\xff")
    )


@pytest.mark.parametrize("reference", ["~nobody-of-that-name/a", "~a\0b", "a" * 5000, "\udcff", ""])
def test_every_reference_has_a_path(reference):
    assert isinstance(os.path.isdir(expanded(reference)), bool)  # noqa: PTH112


def test_the_home_folder_is_put_in(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(expanded("~/models")) == "/somewhere/models"


# JSON


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "Invalid JSON: EOF"),
        ("{", "Invalid JSON"),
        ('{"odd": ' + "[" * 201 + "]" * 201 + "}", "recursion limit exceeded"),
        ('{"name": "\\ud800"}', "Invalid JSON"),
        (b'{"name": "\xed\xa0\x80"}', "Invalid JSON"),
        ('{"name": "a", "count": ' + "9" * 4301 + "}", "number out of range"),
        (b'{"name": "\xff"}', "Invalid JSON: invalid unicode"),
        ('{"name": "a"} more', "trailing characters"),
        ('{"name": 5}', "`name`: Input should be a valid string (it is 5)"),
        ("[]", "should be an object (it is [])"),
        ('{"name": "a", "count": 0}', "`count`: Input should be greater than or equal to 1 (it is 0)"),
        ('{"name": "a", "parts": {"b": [1, "c"]}}', "`parts.b.1`: Input should be a valid integer"),
        ("{}", "`name`: Field required"),
    ],
)
def test_json_that_does_not_fit_names_the_file_the_field_and_the_value(write, content, told):
    path = write(content)
    message = refused(read_json, path, Options, remedy=REMEDY)
    assert message.startswith(f"{path} cannot be used")
    assert message.endswith(f"\n{REMEDY}")
    assert told in message


def test_json_that_fits_is_read(write):
    assert read_json(write(b'\xef\xbb\xbf{"name": "a"}'), Options, remedy=REMEDY) == Options(name="a")
    assert read_json(write("[" * 199 + "]" * 199), TypeAdapter(Any), remedy=REMEDY)
    assert read_json(write('{"a": 1, "a": 2}'), ANY_OBJECT, remedy=REMEDY) == {"a": 2}


def test_a_field_with_a_zero_byte_is_shown_and_not_repeated(write):
    message = refused(read_json, write('{"x\\u0000y": 1}'), Options, remedy=REMEDY)
    assert "`x\\x00y`" in message
    assert "\0" not in message


def test_at_most_twenty_problems_are_listed(write):
    content = '{"name": "a", ' + ", ".join(f'"odd{i}": {i}' for i in range(50)) + "}"
    message = refused(read_json, write(content), Options, remedy=REMEDY)
    assert message.count("Extra inputs are not permitted") == MOST_PROBLEMS
    assert "- and 30 more" in message


def test_a_long_value_is_cut_off(write):
    message = refused(read_json, write('{"name": ["' + "a" * 10_000 + '"]}'), Options, remedy=REMEDY)
    assert "aaa…)" in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "content",
    ['{"schema_version": 4, "new": 1}', '{"schema_version": 4}', '{"schema_version": 2, "name": 5}'],
)
def test_another_version_is_told_as_that(write, content):
    path = write(content)
    message = refused(read_json, path, Versioned, remedy=REMEDY)
    assert message == f"{path} has schema version {content[19]}, and this release reads version 3. {REMEDY}"


@pytest.mark.parametrize("content", ['{"schema_version": "new"}', '{"schema_version": null}', "[]"])
def test_a_version_that_is_none_is_a_problem_like_others(write, content):
    assert "cannot be used" in refused(read_json, write(content), Versioned, remedy=REMEDY)


# JSON lines


def test_every_bad_line_is_named_by_its_number(write):
    path = write('{"name": "a"}\n\nno\n{"name": 1}\n  \n{"name": "b", "count": 2}')
    message = refused(read_json_lines, path, Options, remedy=REMEDY)
    assert "- line 3: Invalid JSON" in message
    assert "- line 4: `name`: Input should be a valid string (it is 1)" in message
    assert "line 1:" not in message
    assert "line 6:" not in message


def test_separators_of_unicode_end_no_line(write):
    path = write('\ufeff{"name": "a\u2028b"}\r\n{"name": "c\u0085d"}\n')
    assert [each.name for each in read_json_lines(path, Options, remedy=REMEDY)] == ["a\u2028b", "c\u0085d"]


def test_a_journal_that_a_kill_cut_short_is_mended(write):
    path = write('{"name": "a"}\n{"name": "b"}\n{"name": "c')
    assert [each.name for each in read_journal(path, Options, remedy=REMEDY)] == ["a", "b"]
    assert path.read_text() == '{"name": "a"}\n{"name": "b"}\n'
    assert read_journal(path.with_name("gone"), Options, remedy=REMEDY) == []


def test_what_is_no_journal_is_left_as_it_is(write):
    path = write("my notes\nwithout an end")
    assert "line 1: Invalid JSON" in refused(read_journal, path, Options, remedy=REMEDY)
    assert path.read_text() == "my notes\nwithout an end"


def test_an_append_that_the_disk_refuses_leaves_the_journal_as_it_was(write):
    path = write("[1]\n")
    append_journal(path, "[2]")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            append_journal(path, "[3, 4, 5]")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_journal(path, "[6]")
    assert read_journal(path, TypeAdapter(list[int]), remedy=REMEDY) == [[1], [2], [6]]


def test_the_data_of_the_package_are_there():
    row = read_data("harmful_prompts.jsonl", ANY_OBJECT)[0]
    assert row.keys() == {"category", "prompt"}


# YAML

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (BOMB, "anchors and aliases are not allowed"),
        ("name: &a b\nparts: {c: *a}", "anchors and aliases"),
        ("[" * (MAX_YAML_DEPTH + 1), f"nested more than {MAX_YAML_DEPTH} levels"),
        ("name: 2025-02-30", "day is out of range"),
        ("name: 2025-13-01", "month must be in 1..12"),
        ("name: 2001-12-14t21:59:43.10-99:99", "cannot be read as YAML"),
        ("name: !!timestamp x", "cannot be read as YAML"),
        ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ('name: "\\ud800"', "surrogates not allowed"),
        ("? {a: b}\n: c", "unhashable"),
        ("name: a\n b: c", "cannot be read as YAML"),
        ("name: a\x00b", "cannot be read as YAML"),
        ("count: 0x" + "f" * 9000, "a number of 9,002 digits"),
        ("count: 1" + ":1" * 50_000, "a number of 100,001 digits"),
        ("count: !!int many", "invalid literal"),
        ('count: !!int ""', "cannot be read as YAML"),
        ('count: !!float ""', "cannot be read as YAML"),
        ("count: !!bool maybe", "cannot be read as YAML"),
        ("name: [1]", "`name`: Input should be a valid string (it is [1])"),
        ("- a", "should be a valid dictionary"),
        ("", "should be a valid dictionary"),
    ],
)
def test_yaml_that_does_not_fit_is_one_message(write, content, told):
    path = write(content)
    message = refused(read_yaml, path, Options, remedy=REMEDY)
    assert message.startswith(str(path))
    assert message.endswith(REMEDY)
    assert told in message


def test_yaml_and_json_are_read_as_yaml(write):
    path = write("\ufeffname: a\nparts:\n  b: [1, 2]\n")
    assert read_yaml(path, Options, remedy=REMEDY) == Options(name="a", parts={"b": [1, 2]})
    assert read_yaml(write('{"name": "a"}'), Options, remedy=REMEDY) == Options(name="a")
    deep = "[" * MAX_YAML_DEPTH + "]" * MAX_YAML_DEPTH
    assert parse_yaml(deep, TypeAdapter(Any), source="text", remedy=REMEDY)


def test_yaml_that_is_too_long_is_refused(write):
    text = "name: " + "a" * MAX_YAML_BYTES
    assert "bytes; a file of its kind has 262,144 at most" in refused(
        read_yaml, write(text), Options, remedy=REMEDY
    )
    message = refused(parse_yaml, text, Options, source="the card", remedy=REMEDY)
    assert message == f"the card has 262,150 characters; 262,144 are read as YAML at most. {REMEDY}"


def test_what_one_thread_reads_is_not_another_threads(write, monkeypatch):
    """The depth of a document that is read meanwhile is not added to that of this one."""
    deep = write("a: " + "[" * (MAX_YAML_DEPTH - 2) + "]" * (MAX_YAML_DEPTH - 2))
    deepest, compose = [], files._Loader.compose_node

    def read():
        return read_yaml(deep, ANY_OBJECT, remedy=REMEDY)

    def composed(loader, parent, index):
        if loader.depth == MAX_YAML_DEPTH - 2 and not deepest:
            deepest.append(loader)
            with ThreadPoolExecutor() as pool:
                deepest.append(pool.submit(read).result())
        return compose(loader, parent, index)

    monkeypatch.setattr(files._Loader, "compose_node", composed)
    found = read()
    assert deepest[1] == found


def test_a_schema_may_be_a_literal_version(write):
    class Fixed(BaseModel):
        schema_version: Literal[2] = 2

    assert "has schema version 1, and this release reads version 2" in refused(
        read_json, write('{"schema_version": 1}'), Fixed, remedy=REMEDY
    )


def test_the_limit_for_all_files_lets_the_largest_tokenizers_pass():
    assert files.MAX_BYTES >= 5 * 35_000_000
