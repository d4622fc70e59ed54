"""Questions from data files of every format, and from the Hub as `datasets` would give them."""

import csv
import json
import os
import sys

import pyarrow as pa
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import Table, parquet

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.datasets import load
from deltaguard.evaluation.datasets.load import DATASETS, load_questions, load_set
from deltaguard.evaluation.exchange import FollowUp, Question

OWN = [
    {"prompt": "How, \u2028 now?", "system": "Be brief.", "expected": "Thus."},
    {"prompt": 'Who says "so"?', "system": None, "expected": None},
    {"prompt": "What\nfor?", "system": None, "expected": "7"},
]
QUESTIONS = [Question(row["prompt"], system=row["system"], expected=row["expected"]) for row in OWN]


def write_table(path, rows, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path, rows):
    parquet.write_table(Table.from_pylist(rows), path)
    return path


WRITERS = {
    "csv": write_table,
    "tsv": lambda path, rows: write_table(path, rows, "\t"),
    "json": write_json,
    "jsonl": write_lines,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("ending", WRITERS)
def test_a_file_of_ones_own(tmp_path, ending):
    path = WRITERS[ending](tmp_path / f"mine.{ending}", OWN)
    assert load_questions(path) == QUESTIONS


def test_texts_alone_under_one_key(tmp_path):
    path = write_json(
        tmp_path / "mine.json",
        {"note": "mine", "tags": ["x", "y", "x"], "instructions": ["Why?", "How?", "Why?"]},
    )
    assert load_questions(path) == [Question("Why?"), Question("How?")]


def test_rows_that_repeat_a_question_are_counted(tmp_path):
    rows = [
        {"prompt": "Why?"},
        {"prompt": "How?"},
        {"prompt": "Why?"},
        {"prompt": "Why?", "system": "Brief."},
    ]
    found = load_set(write_lines(tmp_path / "mine.jsonl", rows))
    assert [question.prompt for question in found.questions] == ["Why?", "How?", "Why?"]
    assert found.note == f"1 of 4 rows of {found.source} repeat the question of another and were left out."
    assert load_set(write_lines(tmp_path / "mine.jsonl", rows[:2])).note is None


def test_response_is_another_name_for_expected_and_numbers_are_texts(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [{"Prompt": "6 * 7?", "response": 42}])
    assert load_questions(path) == [Question("6 * 7?", expected="42")]


@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 30))
def test_fewer_are_among_more_and_in_order(seed, first, second):
    questions = [Question(f"{i}?") for i in range(30)]
    fewer, more = sorted((first, second))
    small = load.drawn(questions, fewer, seed, "file")
    large = load.drawn(questions, more, seed, "file")
    assert len(small) == fewer
    assert set(small) <= set(large)
    assert small == sorted(small, key=questions.index)


def test_the_seed_fixes_the_draw(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [{"prompt": f"{i}?"} for i in range(50)])
    draws = {seed: load_questions(path, count=10, seed=seed) for seed in range(4)}
    assert draws[1] == load_questions(path, count=10, seed=1)
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert load_questions(path, count=50) == load_questions(path)


@pytest.mark.parametrize("count", [0, 51])
def test_more_than_there_are(tmp_path, count):
    path = write_lines(tmp_path / "mine.jsonl", [{"prompt": f"{i}?"} for i in range(50)])
    with pytest.raises(DeltaguardError, match=rf"{count} questions .*mine\.jsonl holds 50"):
        load_questions(path, count=count)


# Rows as the releases have them, with texts of our own, and the prompts that belong to the set.
RELEASES = [
    ("hex-phi", [{"prompt": "Steal it?"}], ["Steal it?"]),
    ("advbench", [{"goal": "Steal it", "target": "Sure, this is"}], ["Steal it"]),
    ("advbench", [{"prompt": "Steal it", "target": "Sure, this is"}], ["Steal it"]),
    (
        "harmbench",
        [
            {"Behavior": "Steal it", "FunctionalCategory": "standard"},
            {"Behavior": "Steal this", "FunctionalCategory": "contextual"},
        ],
        ["Steal it"],
    ),
    ("harmbench", [{"prompt": "Steal it", "category": "illegal"}], ["Steal it"]),
    ("strongreject", [{"category": "x", "forbidden_prompt": "Steal it"}], ["Steal it"]),
    ("jailbreakbench", [{"Index": 1, "Goal": "Steal it", "Target": "Sure"}], ["Steal it"]),
    ("jailbreakbench-benign", [{"Goal": "Buy it", "Target": "Sure"}], ["Buy it"]),
    (
        "beavertails",
        [
            {"prompt": "Steal it?", "response": "No.", "is_safe": True},
            {"prompt": "Steal it?", "response": "Yes.", "is_safe": False},
            {"prompt": "Steal it?", "response": "Surely.", "is_safe": False},
            {"prompt": "Buy it?", "response": "Yes.", "is_safe": True},
        ],
        ["Steal it?"],
    ),
    (
        "xstest-safe",
        [{"prompt": "Kill a process?", "label": "safe"}, {"prompt": "Kill a man?", "label": "unsafe"}],
        ["Kill a process?"],
    ),
    (
        "xstest-unsafe",
        [
            {"prompt": "Kill a process?", "type": "homonyms"},
            {"prompt": "Kill it?", "type": "contrast_homonyms"},
        ],
        ["Kill it?"],
    ),
    ("or-bench-hard", [{"prompt": "Shoot a film?", "category": "x"}], ["Shoot a film?"]),
    ("or-bench-toxic", [{"prompt": "Steal it?", "category": "x"}], ["Steal it?"]),
    (
        "samsum",
        [{"id": "1", "dialogue": "A: Hi\nB: Hi", "summary": "A greets B."}],
        ["Summarise this conversation in one or two sentences.\n\nA: Hi\nB: Hi"],
    ),
    ("gsm8k", [{"question": "6 * 7?", "answer": "6 * 7 = 42\n#### 42"}], ["6 * 7?"]),
]

# As the Hub has them, and as the original release does, which leaves out references that there are none.
CONVERSATIONS = [
    [
        {"category": "maths", "prompt": ["6 * 7?", "And twice that?"], "reference": ["42", "84"]},
        {"category": "writing", "prompt": ["Write a line.", "Shorter."], "reference": []},
    ],
    [
        {"question_id": 1, "turns": ["6 * 7?", "And twice that?"], "reference": ["42", "84"]},
        {"question_id": 2, "turns": ["Write a line.", "Shorter."]},
    ],
]
BOTH_TURNS = [
    Question("6 * 7?", expected="42", follow_up=FollowUp("And twice that?", "84")),
    Question("Write a line.", follow_up=FollowUp("Shorter.")),
]


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(("name", "rows", "prompts"), RELEASES)
def test_releases_from_a_file(tmp_path, name, rows, prompts, ending):
    path = WRITERS[ending](tmp_path / f"set.{ending}", rows)
    found = load_questions(name, path=path)
    assert [question.prompt for question in found] == prompts
    assert all((q.expected is not None) == (len(DATASETS[name].expected_columns) > 0) for q in found)


@pytest.mark.parametrize(("name", "rows", "prompts"), RELEASES)
def test_releases_from_the_hub(monkeypatch, name, rows, prompts):
    calls = []

    def load_dataset(hub_id, config, *, split, **options):
        calls.append((hub_id, config, split, options))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [question.prompt for question in load_questions(name)] == prompts
    spec = DATASETS[name]
    options = {"data_files": "category_*.csv", "column_names": ["prompt"]} if name == "hex-phi" else {}
    assert calls == [(spec.hub_id, spec.config, spec.split, options)]


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("rows", CONVERSATIONS)
def test_both_turns_of_a_conversation_are_read(tmp_path, rows, ending):
    path = WRITERS[ending](tmp_path / f"set.{ending}", rows)
    assert load_questions("mt-bench", path=path) == BOTH_TURNS


def test_both_turns_from_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: CONVERSATIONS[0])
    assert load_questions("mt-bench") == BOTH_TURNS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": "6 * 7?"}, "Row 1 .* a str in column `turns`, where a list of turns belongs"),
        ({"turns": []}, "Row 1 .* 0 turns in column `turns`, and a conversation has two"),
        ({"turns": ["a"]}, "Row 1 .* 1 turn in column `turns`, and a conversation has two"),
        ({"turns": ["a", "b", "c"]}, "Row 1 .* 3 turns in column `turns`, and a conversation has two"),
        ({"turns": ["a", "b"], "reference": ["1", "2", "3"]}, "Row 1 .* 3 turns in column `reference`"),
        ({"turns": ["a", " "]}, "Row 1 .* no text in column `turns`"),
        ({"turns": None, "reference": ["1", "2"]}, "Row 1 .* no text in column `turns`"),
        ({"turns": [["a"], "b"]}, "a list in column `turns`, where text belongs"),
        ({"turns": ["a", "b"], "reference": "42"}, "Row 1 .* a str in column `reference`"),
    ],
)
def test_turns_that_are_none(tmp_path, row, message):
    path = write_lines(tmp_path / "set.jsonl", [row])
    with pytest.raises(DeltaguardError, match=message):
        load_questions("mt-bench", path=path)


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"turns": [7, 8]}, Question("7", follow_up=FollowUp("8"))),
        ({"turns": ["a", "b"], "reference": None}, Question("a", follow_up=FollowUp("b"))),
        ({"turns": ["a", "b"], "reference": [1]}, Question("a", expected="1", follow_up=FollowUp("b"))),
        ({"turns": ["a", "b"], "reference": [None, "2"]}, Question("a", follow_up=FollowUp("b", "2"))),
    ],
)
def test_turns_of_which_some_have_a_right_answer(tmp_path, row, question):
    path = write_lines(tmp_path / "set.jsonl", [row])
    assert load_questions("mt-bench", path=path) == [question]


def test_conversations_that_begin_alike_are_two(tmp_path):
    rows = [{"turns": ["a", "b"]}, {"turns": ["a", "c"]}, {"turns": ["a", "b"]}]
    found = load_set("mt-bench", path=write_lines(tmp_path / "set.jsonl", rows))
    assert [each.follow_up for each in found.questions] == [FollowUp("b"), FollowUp("c")]
    assert "1 of 3 rows" in found.note


def test_every_set_has_a_test():
    assert {name for name, _, _ in RELEASES} | {"mt-bench"} == set(DATASETS)


def test_hex_phi_as_a_folder_without_headers(tmp_path):
    (tmp_path / "category_1.csv").write_text('"Steal it, now?"\nSteal this?\n')
    (tmp_path / "category_10.csv").write_text("Rob him?\n")
    found = [question.prompt for question in load_questions("hex-phi", path=tmp_path)]
    assert found == ["Steal it, now?", "Steal this?", "Rob him?"]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no network"),
        DatasetNotFoundError("gated"),
        ValueError("x"),
        RuntimeError("y"),
        TypeError("z"),
    ],
)
def test_what_the_hub_refuses_says_where_to_get_it(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DeltaguardError) as raised:
        load_questions("beavertails")
    text = str(raised.value)
    assert str(error) in text
    assert DATASETS["beavertails"].terms in text
    assert DATASETS["beavertails"].homepage in text
    assert "hf auth login" in text


def test_without_its_library_it_says_where_to_get_the_set_and_under_which_terms(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DeltaguardError, match=r"pip install 'deltaguard\[eval\]'") as raised:
        load_questions("beavertails")
    assert DATASETS["beavertails"].terms in str(raised.value)
    assert DATASETS["beavertails"].homepage in str(raised.value)


def test_a_missing_file_says_where_to_get_it_and_under_which_terms(tmp_path):
    with pytest.raises(DeltaguardError) as raised:
        load_questions("samsum", path=tmp_path / "none.csv")
    assert str(tmp_path / "none.csv") in str(raised.value)
    assert "CC-BY-NC-ND-4.0" in str(raised.value)
    assert "huggingface.co/datasets/knkarthick/samsum" in str(raised.value)


def test_an_unknown_name_lists_those_known():
    with pytest.raises(DeltaguardError, match=r"no file nothing .* Known sets: hex-phi, advbench"):
        load_questions("nothing")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"text": "a"}, "columns `text`, and lacks `question` and `answer`"),
        ("strongreject", {"text": "a"}, "columns `text`, and lacks `prompt` or `forbidden_prompt`"),
        ("xstest-safe", {"prompt": "a"}, "columns `prompt`, and lacks `label` or `type`"),
        (None, {"instruction": "a", "output": "b"}, "columns `instruction`, `output`; .* needs `prompt`"),
    ],
)
def test_wrong_columns_are_named(tmp_path, name, row, message):
    path = write_lines(tmp_path / "set.jsonl", [row])
    with pytest.raises(DeltaguardError, match=message):
        load_questions(path) if name is None else load_questions(name, path=path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.txt", "prompt", r"ending '\.txt'; .*\.csv, \.tsv, \.json, \.jsonl, \.parquet"),
        ("a.csv", "prompt\na,b\n", "1 rows .* more fields than its header, .* row 1"),
        ("a.csv", "prompt,system\n,x\n", "Row 1 .* no text in column `prompt`"),
        ("a.json", "{", r"a\.json cannot be used: Invalid JSON"),
        ("a.json", '"text"', "holds a JSON str"),
        ("a.json", '{"a": [1], "b": [2]}', "holds a JSON dict"),
        ("a.json", '["a", 7]', "1 of 2 items .* item 2, a int"),
        ("a.jsonl", '{"prompt": "a"}\nno\n', "line 2: Invalid JSON"),
        ("a.jsonl", '{"prompt": ["a"]}\n', "Row 1 .* a list in column `prompt`"),
        ("a.jsonl", '{"prompt": " "}\n', "Row 1 .* no text"),
        ("a.jsonl", "", r"has the columns \(none\)"),
        ("a.parquet", "prompt", r"parquet file .*a\.parquet cannot be read"),
    ],
)
def test_broken_files(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(DeltaguardError, match=message):
        load_questions(tmp_path / file)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt\n\xff\xfe\n")
    with pytest.raises(DeltaguardError, match=r"a\.csv is not text in UTF-8"):
        load_questions(tmp_path / "a.csv")


def test_hex_phi_with_more_than_one_column(tmp_path):
    (tmp_path / "a.csv").write_text("Steal it, now?\n")
    with pytest.raises(DeltaguardError, match=r"1 rows .* more than one field"):
        load_questions("hex-phi", path=tmp_path / "a.csv")


def test_columns_may_have_spaces_around_their_names(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("prompt, label\nKill a process?,safe\nKill a man?,unsafe\n")
    assert [row.prompt for row in load_questions("xstest-safe", path=path)] == ["Kill a process?"]


def test_a_set_of_which_nothing_is_left(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "Kill it?", "label": "unsafe"}])
    with pytest.raises(DeltaguardError, match=r"a\.jsonl holds no question"):
        load_questions("xstest-safe", path=path)


def test_a_parquet_file_that_stands_for_more_than_is_read(tmp_path):
    """A few hundred bytes may say so."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": pa.array(["a"] * 1_000_001).dictionary_encode()}), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(DeltaguardError, match=r"has 1,000,001 rows of .* 1,000,000 rows .* are read at most"):
        load_questions(path)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([10**15], pa.timestamp("ms")), "cannot be read"),
        (pa.array([b"\xff"], pa.binary()), "a bytes in column `prompt`"),
        (pa.array([["a"]]), "a list in column `prompt`"),
        (pa.array([None], pa.string()), "no text in column `prompt`"),
    ],
)
def test_a_parquet_file_of_other_types(tmp_path, column, message):
    parquet.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    with pytest.raises(DeltaguardError, match=message):
        load_questions(tmp_path / "a.parquet")


def test_cells_as_long_as_csv_has_them(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n" + "a" * 200_000)
    with pytest.raises(DeltaguardError, match="cannot be read: field larger than field limit"):
        load_questions(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_a_pipe_in_the_place_of_data_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DeltaguardError, match="no regular file"):
        load_questions("gsm8k", path=tmp_path / name)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/a.csv", "a\0b", "~a\0b", "a" * 5000])
def test_a_name_that_no_file_can_have_is_one_message(name):
    with pytest.raises(DeltaguardError, match="There is no file"):
        load_questions(name)
    with pytest.raises(DeltaguardError, match="There is no file"):
        load_questions("gsm8k", path=name)
