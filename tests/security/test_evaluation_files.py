"""Damaged files of an evaluation that goes on: each is named with what to do, and nothing else is lost."""

import json

import pytest
from pydantic import StrictFloat, TypeAdapter

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.asking import _SCHEMAS
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.journal import AnswerFile, Clock
from deltaguard.evaluation.judges.llm import LLMJudge
from deltaguard.evaluation.server import Server
from suites import server, suite_file

SUITE = """
name: ten
judges: [{kind: opening}, {kind: llm, base_url: URL, model: judge}]
sections:
  - {name: attack, kind: attack, builtin: attack, count: 3}
  - {name: task, kind: utility, builtin: task, count: 2, scorers: [json-match]}
"""
HEAD = {"made_by": {"model": "m", "options": []}}
PROMPTS = ("How?", "Why?", "Who?")


def row(index=0, value="Yes.", **more):
    return {
        "index": index,
        "prompt": PROMPTS[index % 3] if isinstance(index, int) else "How?",
        "value": value,
        **more,
    }


def lines(*rows):
    return "".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in rows)


def opened(path, schema=_SCHEMAS["answers"]):
    return AnswerFile(path, prompts=PROMPTS, made_by=HEAD["made_by"], schema=schema)


def harness(**changed):
    fine = {"task": "t", "metric": "acc", "value": 0.5, "stderr": None, "higher_is_better": True,
            "samples": 8, "version": "1", "n_shot": 0, "chat_template": True,
            "harness_version": "0.4"}  # fmt: skip
    return [fine | changed]


DAMAGED = {
    "no head": ([row()], "does not begin with what its answers were made by"),
    "a head of another shape": ([{"made_by": ["m"]}, row()], "`head.made_by`"),
    "a head that is more": ([HEAD | {"more": 1}, row()], "`head.more`"),
    "two heads": ([HEAD, HEAD, row()], "line 2: another `made_by`"),
    "an index that is too large": ([HEAD, row(7)], "line 2: index 7, and there are 3 prompts"),
    "an index below 0": ([HEAD, row(-1)], "`row.index`"),
    "an index that is text": ([HEAD, row("0")], "`row.index`"),
    "an index that is true": ([HEAD, row(True)], "`row.index`"),
    "an index that is no whole number": ([HEAD, row(0.5)], "`row.index`"),
    "an index of 400 digits": ([HEAD, row(10**400)], "line 2: index 1000"),
    "an index that is missing": ([HEAD, {"prompt": "How?", "value": "Yes."}], "`row.index`: Field required"),
    "an index twice": ([HEAD, row(1), row(0), row(1)], "line 4: index 1 a second time"),
    "another prompt": ([HEAD, row() | {"prompt": "Why?"}], "line 2: the prompt is not that of index 0"),
    "a number as answer": ([HEAD, row(0, 5)], r"line 2, value: .*\(it is 5\)"),
    "nothing as answer": ([HEAD, row(0, None)], r"line 2, value: .*\(it is None\)"),
    "a list as answer": ([HEAD, row(0, ["Yes."])], r"line 2, value: .*\['Yes\.'\]"),
    "no value": ([HEAD, {"index": 0, "prompt": "How?"}], "`row.value`: Field required"),
    "more": ([HEAD, row(more=1)], "`row.more`"),
    "a line that is a list": ([HEAD, [0, "How?", "Yes."]], "line 2"),
    "a line that is no JSON": ([HEAD, "{\n", row()], "line 2: Invalid JSON"),
    "half a pair": ([HEAD, '{"index": 0, "prompt": "How?", "value": "\\ud800"}\n'], "line 2: Invalid JSON"),
    "deep nesting": ([HEAD, "[" * 100_000 + "]" * 100_000 + "\n"], "line 2: Invalid JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_answers_is_named_and_left_as_it_is(tmp_path, name):
    rows, told = DAMAGED[name]
    path = tmp_path / "attack.jsonl"
    path.write_text(lines(*rows))
    with pytest.raises(DeltaguardError, match=told) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert "Remove this file to have its answers generated again" in str(caught.value)
    assert path.read_text() == lines(*rows)


def test_all_that_is_wrong_is_told_and_no_more_than_twenty_lines(tmp_path):
    path = tmp_path / "attack.jsonl"
    path.write_text(lines(HEAD, *(row(0, 1) for _ in range(50))))
    with pytest.raises(DeltaguardError) as caught:
        opened(path)
    assert "line 2, value" in str(caught.value)
    assert "and 30 more" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fine", "wrong"),
    [
        ("likelihood", 1.5, ["1.5", None, True, [1.5]]),
        ("likelihood", 2, [{}]),
        ("suffixes", "! !", [1, None]),
        ("harness", harness(), [harness(samples=-1), harness(samples=10**30), harness(value="much"),
                                harness(task=None), {}, "x", [1], [{}]]),
    ],
)  # fmt: skip
def test_each_kind_of_file_holds_its_own_kind_of_values(tmp_path, kind, fine, wrong):
    path = tmp_path / "file.jsonl"
    path.write_text(lines(HEAD, row(0, fine)))
    assert opened(path, _SCHEMAS[kind]).values == {0: fine}
    for value in wrong:
        path.write_text(lines(HEAD, row(0, value)))
        with pytest.raises(DeltaguardError, match="value"):
            opened(path, _SCHEMAS[kind])


def test_numbers_that_are_none_are_kept_as_they_were_measured(tmp_path):
    path = tmp_path / "file.jsonl"
    opened(path, TypeAdapter(StrictFloat)).add([0, 1], [float("nan"), float("inf")])
    found = opened(path, TypeAdapter(StrictFloat)).values
    assert found[0] != found[0]
    assert found[1] == float("inf")


def test_a_file_of_another_run_is_told_in_a_few_words(tmp_path):
    path = tmp_path / "attack.jsonl"
    path.write_text(lines({"made_by": {"model": "x" * 10_000, "y" * 10_000: 1}}))
    with pytest.raises(DeltaguardError, match="holds answers of another run") as caught:
        opened(path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "content",
    ["[]\n", "5\n", "{}\n", '{"key": 1, "score": 1}\n', '{"key": "a", "score": 0}\n',
     '{"key": "a", "score": 6}\n', '{"key": "a", "score": "1"}\n', '{"key": "a", "score": true}\n',
     '{"key": "a", "score": 1.5}\n',
     '{"key": "a", "score": 1, "more": 2}\n', "\x00\n", '{"key": "a"}\n{"score": 1}\n'],
)  # fmt: skip
def test_a_damaged_cache_of_scores_is_named(tmp_path, content):
    path = tmp_path / "cache.jsonl"
    path.write_text(content)
    with pytest.raises(DeltaguardError, match=r"cache\.jsonl cannot be used") as caught:
        LLMJudge(Server("http://127.0.0.1:1/v1", "m"), cache=path)
    assert "name another as the judge's cache" in str(caught.value)
    assert path.read_text() == content


def test_a_folder_in_the_place_of_a_cache_is_named(tmp_path):
    with pytest.raises(DeltaguardError, match="no regular file"):
        LLMJudge(Server("http://127.0.0.1:1/v1", "m"), cache=tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"answer": "1"}', '{"answer": -1}', '{"answer": NaN}', '{"answer": true}', "null"],
)
def test_damaged_times_are_named(tmp_path, content):
    (tmp_path / "seconds.json").write_text(content)
    with pytest.raises(DeltaguardError, match=r"seconds\.json cannot be used") as caught:
        _ = Clock(tmp_path / "seconds.json").seconds
    assert "remove it, which loses nothing else" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("seconds.json", "[1]"),
        ("evaluation.json", "[1]"),
        ("evaluation.json", '{"schema_version": "two", "suite": "ten"}'),
        ("evaluation.json", '{"schema_version": 2, "suite": 7}'),
        ("evaluation.json", "\ufeff{"),
        ("answers/m/attack.jsonl", "{}\n"),
        ("answers/n/task.jsonl", "[]\n"),
        ("judge-cache.jsonl", "[]\n"),
    ],
)
def test_a_damaged_file_stops_a_run_before_anything_is_asked_or_lost(tmp_path, name, content):
    asked, out = [], tmp_path / "out"

    def reply(request):
        asked.append(request)
        return 200, "Sure.\nScore: 4"

    with server(reply) as url:
        config, suite = EngineConfig("openai", base_url=url), suite_file(tmp_path, SUITE.replace("URL", url))
        report = evaluate(["m", "n"], out, suite=suite, engine=config)
        count = len(asked)
        fine = (out / name).read_bytes()
        (out / "answers/m/task.jsonl").unlink()
        (out / name).write_text(content)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(DeltaguardError, match=name.rpartition("/")[2]):
            evaluate(["m", "n"], out, suite=suite, engine=config)
        assert len(asked) == count
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        (out / name).write_bytes(fine)
        again = evaluate(["m", "n"], out, suite=suite, engine=config)
    assert len(asked) == count + 2
    assert again.measures == report.measures
