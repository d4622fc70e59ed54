"""Training files: what is learned from them, and what is told of bad ones."""

import json
import re
import tracemalloc

import pytest

from deltaguard.service.publishing import model_name
from deltaguard.service.settings import Limits
from deltaguard.service.tables import Job
from deltaguard.service.training_data import InvalidFileError, check_file, read_examples, read_preferences

LIMITS = Limits(file_rows=30, line_bytes=1000)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def row(*messages):
    return json.dumps({"messages": list(messages)}).encode()


GOOD = row(said("user", "Hello?"), said("assistant", "Hi."))


def read(tmp_path, content):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    try:
        return read_examples(path, LIMITS)
    except InvalidFileError as error:
        # A look at the file finds the same, a line at a time.
        with pytest.raises(InvalidFileError, match=re.escape(str(error))):
            check_file(path, LIMITS, method="supervised")
        raise


def test_every_answer_with_a_weight_is_learned(tmp_path):
    first = row(
        said("system", "Be brief."),
        said("user", "A fruit?"),
        said("assistant", "Apple.", weight=0),
        said("user", [{"type": "text", "text": "Another"}, {"type": "text", "text": "one?"}]),
        said("assistant", "Pear.", weight=1),
    )
    one, other = read(tmp_path, b"\xef\xbb\xbf" + first + b"\r\n\n" + GOOD)
    assert one.answer == "Pear."
    assert [turn["role"] for turn in one.turns] == ["system", "user", "assistant", "user"]
    assert one.turns[-1]["content"] == "Another\none?"
    assert other.answer == "Hi."


def test_all_bad_lines_are_told_with_their_numbers(tmp_path):
    bad = [
        b"{",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        row(said("user", "Hello?")),
        row(said("assistant", "Hi."), said("user", "Hello?")),
        row(said("user", "Hello?"), said("assistant", "")),
        row(said("robot", "Hello?"), said("assistant", "Hi.")),
        row(said("user", "x" * 2000), said("assistant", "Hi.")),
        row(said("user", "Hello?"), said("assistant", "Hi.", weight=0)),
        row(said("user", "Hello?"), said("assistant", "Hi.", tool_calls=[])),
        b'{"prompt": "Hello?", "completion": "Hi."}',
        b'{"messages": [{"content": "Hello?"}, {"role": "assistant", "content": "Hi."}]}',
        row({"role": None, "content": "Hello?"}, said("assistant", "Hi.")),
        b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "Hi."}]}',
        b'{"messages": ' + b"[" * 900,
        b'{"messages": NaN}',
        b"null",
    ]
    with pytest.raises(InvalidFileError) as error:
        read(tmp_path, b"\n".join([GOOD, *bad, GOOD]))
    message = str(error.value)
    for number in range(2, len(bad) + 2):
        assert f"line {number}: " in message
    assert "line 1: " not in message
    assert f"line {len(bad) + 2}: " not in message
    for why in ("0xff", "more than 1,000 bytes", "weight 0", "`messages`", "tool_calls"):
        assert why in message


def preference(*messages, good="Hi.", bad="What?", **more):
    outputs = {
        "preferred_output": [said("assistant", good)],
        "non_preferred_output": [said("assistant", bad)],
    }
    return json.dumps({"input": {"messages": list(messages), **more}} | outputs).encode()


def test_preferences_are_read_in_openais_format(tmp_path):
    path, ask = tmp_path / "file.jsonl", said("user", "Hello?")
    empty = preference(ask, tools=[], parallel_tool_calls=True)
    path.write_bytes(preference(said("system", "Be brief."), ask) + b"\n" + empty)
    first, other = read_preferences(path, LIMITS)
    assert [turn["role"] for turn in first.turns] == ["system", "user"]
    assert (other.preferred, other.rejected) == ("Hi.", "What?")


def test_all_bad_preferences_are_told_with_their_numbers(tmp_path):
    path, ask = tmp_path / "file.jsonl", said("user", "Hello?")
    bad = [
        GOOD,
        preference(ask, said("assistant", "Hi.")),
        preference(ask, good="Same.", bad="Same."),
        preference(ask, tools=[{"type": "function"}]),
        json.dumps(
            {"input": {"messages": [ask]}, "preferred_output": [], "non_preferred_output": []}
        ).encode(),
    ]
    path.write_bytes(b"\n".join([preference(ask), *bad]))
    with pytest.raises(InvalidFileError) as error:
        read_preferences(path, LIMITS)
    message = str(error.value)
    for number in range(2, len(bad) + 2):
        assert f"line {number}: " in message
    assert "line 1: " not in message
    for why in ("the user last", "neither is preferred", "tools", "non_preferred_output"):
        assert why in message


@pytest.mark.parametrize(
    ("content", "why"), [(b"\n \n", "no example"), (GOOD + b"\n", None), (b"", "no example")]
)
def test_a_file_has_examples(tmp_path, content, why):
    if why is None:
        assert len(read(tmp_path, content)) == 1
        return
    with pytest.raises(InvalidFileError, match=why):
        read(tmp_path, content)


def test_an_example_has_no_more_turns_than_can_be_kept(tmp_path):
    turns = [{"role": role, "content": "a"} for _ in range(251) for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(InvalidFileError, match=r"line 1: .*messages.* at most 500"):
        read_examples(tmp_path / "rows.jsonl", Limits())


def test_too_many_rows_are_refused(tmp_path):
    assert len(read(tmp_path, (GOOD + b"\n") * 30)) == 30
    with pytest.raises(InvalidFileError, match="more than 30"):
        read(tmp_path, (GOOD + b"\n") * 31)


@pytest.mark.parametrize("suffix", ["../../etc", "it's", '"', "🙂", None, "a b"])
def test_a_models_name_holds_nothing_that_leads_anywhere(suffix):
    name = model_name(Job(id="ftjob-0123456789", model="tiny", organisation="acme", suffix=suffix))
    assert name.startswith("ft:tiny:acme:")
    assert not set(name) & set("/\\'\" ")
    assert ".." not in name


def test_a_file_is_looked_at_a_line_at_a_time(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"\n".join([row(said("user", "Hello?"), said("assistant", "x" * 1000))] * 4000))
    tracemalloc.start()
    check_file(path, Limits(), method="supervised")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


def test_answers_are_limited_as_examples_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    path.write_text(json.dumps({"messages": turns * 6}) + "\n" + json.dumps({"messages": turns * 4}))
    check_file(path, Limits(file_rows=10), method="supervised")
    with pytest.raises(InvalidFileError, match="More than 9 answers would be learned"):
        check_file(path, Limits(file_rows=9), method="supervised")
