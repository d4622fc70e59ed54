"""`deltaguard eval`, as programs and people call it."""

import json
import sys

import pytest

from deltaguard.cli.app import run
from deltaguard.evaluation.judges.rules import OpeningJudge
from suites import server, suite_file, two_models

ONE = """
name: one
decoding: {max_new_tokens: 4}
judges: [{kind: opening}]
sections:
  - {name: attack, kind: attack, builtin: attack, count: 3}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [str(path) for path in two_models(tmp_path_factory.mktemp("models"))]


def test_json_is_the_report_that_was_written(models, tmp_path, capsys):
    out = tmp_path / "out"
    suite = str(suite_file(tmp_path, ONE))
    assert run(["eval", *models, "--suite", suite, "-o", str(out), "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "evaluation.json").read_text())
    assert [model["name"] for model in report["models"]] == ["aligned", "finetuned"]


def test_what_a_library_prints_is_no_part_of_the_document(models, tmp_path, capsys, monkeypatch):
    judge = OpeningJudge.judge

    def printing(*given):
        sys.stdout.write("Downloaded something\n")
        return judge(*given)

    monkeypatch.setattr(OpeningJudge, "judge", printing)
    suite = str(suite_file(tmp_path, ONE))
    assert run(["eval", models[0], "--suite", suite, "-o", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["suite"] == "one"
    assert "Downloaded something" in captured.err


def test_people_get_a_table_and_where_the_rest_is(models, tmp_path, capsys):
    out, suite = tmp_path / "out", str(suite_file(tmp_path, ONE))
    assert run(["eval", models[0], "--suite", suite, "-o", str(out)]) == 0
    drawn = capsys.readouterr().out
    assert "attack success" in drawn
    # A long path is broken where the terminal ends.
    assert "README.md" in drawn.replace("\n", "")


def test_a_judge_on_a_server_joins_those_of_the_suite(models, tmp_path, capsys):
    out, suite = tmp_path / "out", str(suite_file(tmp_path, ONE))
    with server(lambda _: (200, "It follows the request.\nScore: 5")) as url:
        judge = ["--judge-url", url, "--judge-model", "m"]
        assert run(["eval", models[0], "--suite", suite, "-o", str(out), *judge, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    scores = [row["estimate"]["value"] for row in report["measures"] if row["name"] == "harmfulness"]
    assert scores == [5]
    assert report["agreements"][0]["total"] == 3


@pytest.mark.parametrize(
    "judge", [["--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "m"], ["--guard", "nowhere"]]
)
def test_a_judge_of_nothing_is_refused_before_anything_is_asked(models, tmp_path, capsys, judge):
    out = tmp_path / "out"
    assert run(["eval", models[0], "--suite", "utility", "-o", str(out), *judge]) == 1
    assert "Nothing in the suite utility is to be judged by these" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--suite", "nowhere.yaml"], 1, "nowhere.yaml"),
        (["--device", "no-such-device"], 1, "no-such-device"),
        (["--engine", "openai"], 2, "--base-url URL"),
        (["--base-url", "http://127.0.0.1:1/v1"], 2, "the engine is transformers"),
        (["--engine", "openai", "--base-url", "http://a", "--dtype", "float16"], 2, "--dtype is of weights"),
        (["--api-key-env", "KEY", "--engine", "vllm"], 2, "--api-key-env is for --engine openai"),
        (["--batch-size", "0"], 2, "--batch-size must be at least 1, and is 0"),
        (["--judge-api-key-env", "KEY"], 2, "--judge-url"),
        (["--guard-template", "wildguard"], 2, "--guard"),
        (["--judge-model", "m"], 2, "--judge-url"),
        (["--engine", "magic"], 2, "engine"),
    ],
)
def test_bad_options(models, tmp_path, capsys, options, code, named):
    out = tmp_path / "out"
    assert run(["eval", models[0], "-o", str(out), *options]) == code
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_a_wrong_key_in_a_suite_is_named(models, tmp_path, capsys):
    suite = suite_file(tmp_path, ONE.replace("count", "coutn"))
    assert run(["eval", models[0], "--suite", str(suite), "-o", str(tmp_path / "out")]) == 1
    assert "sections.0.coutn" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(models, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("deltaguard.evaluation.evaluate.evaluate", interrupt)
    assert run(["eval", models[0], "-o", str(tmp_path / "out")]) == 130
    assert "Run the same command again to go on." in capsys.readouterr().err


def test_the_folder_of_another_suite_is_refused_by_name(models, tmp_path, capsys):
    out, suite = tmp_path / "out", suite_file(tmp_path, ONE)
    assert run(["eval", models[0], "--suite", str(suite), "-o", str(out), "--device", "cpu"]) == 0
    before = (out / "evaluation.json").read_text()
    suite.write_text(suite.read_text().replace("name: one", "name: other").replace("count: 3", "count: 2"))
    capsys.readouterr()
    assert run(["eval", models[0], "--suite", str(suite), "-o", str(out), "--device", "cpu"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "by the suite one, and the suite given is other" in told
    assert (out / "evaluation.json").read_text() == before
