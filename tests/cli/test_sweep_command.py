"""`deltaguard sweep`: what it prints, what it writes, and how it fails."""

import json

import pytest

from deltaguard.cli.app import run
from deltaguard.reports.records.sweep import SWEEP_NAME, SweepReport
from pairs import pair


def call(out, *options):
    made = pair()
    tokens = ["sweep", made.aligned, made.finetuned, "-o", out, "--store", made.store, *options]
    return run([*map(str, tokens), *(() if "--device" in options else ("--device", "cpu"))])


def test_json_is_one_document_and_the_page_is_drawn(tmp_path, capsys):
    out = tmp_path / "sweep"
    assert call(out, "--max-safety-kl", "1e-3", "--max-safety-kl", "1e-2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((out / SWEEP_NAME).read_text())
    assert [budget["limit"] for budget in told["budgets"]] == [1e-3, 1e-2]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", SWEEP_NAME]
    assert "deltaguard sweep" in (out / "report.html").read_text(encoding="utf-8")
    SweepReport.model_validate(told)


def test_text_for_people_names_every_limit_and_the_page(tmp_path, capsys):
    assert call(tmp_path) == 0
    captured = capsys.readouterr()
    for limit in ("0.0001", "0.0003", "0.0006", "0.001", "0.003"):
        assert f" {limit} " in captured.out
    assert str(tmp_path / "report.html") in captured.out.replace("\n", "")
    assert "measure: safety KL" in captured.err
    page = (tmp_path / "report.html").read_bytes()
    assert run(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_bytes() == page


def test_utility_data_says_what_the_task_keeps(tmp_path, capsys):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "Why?", "response": "It is good this morning."}\n' * 3)
    assert call(tmp_path / "sweep", "--max-safety-kl", "1e-3", "--utility", str(path)) == 0
    told = capsys.readouterr().out
    assert "3 conversations" in told
    assert "NLL" in told


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-safety-kl", "0"], 2, "greater than or equal to 0.000000001"),
        (["--max-safety-kl", "1e-3", "--max-safety-kl", "-1"], 2, "greater than or equal to 0.000000001"),
        (["--max-safety-kl", "1e-4", "--max-safety-kl=-1"], 2, "it is -1.0"),
        (["--max-safety-kl", "nan"], 2, "it is nan"),
        (["--max-safety-kl", "little"], 2, "max-safety-kl"),
        (["--method", "greedy"], 2, "greedy"),
        (["--utility", "TASK"], 1, "1 of 2 lines of"),
        (["--utility", "NOWHERE"], 1, "cannot be read"),
        (["--device", "abacus"], 1, "abacus"),
    ],
)
def test_a_failure_is_one_message_and_nothing_is_written(options, code, message, tmp_path, capsys):
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "Why?", "response": "It is."}\n{"prompt": "How?"}\n')
    named = {"TASK": str(task), "NOWHERE": str(tmp_path / "nowhere.jsonl")}
    out = tmp_path / "out"
    assert call(out, *[named.get(option, option) for option in options], "--json") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("Error:") == 1
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (out / SWEEP_NAME).exists()


def test_an_output_that_is_a_file_is_said_before_anything_is_measured(tmp_path, capsys):
    out = tmp_path / "file"
    out.write_text("mine")
    assert call(out) == 1
    captured = capsys.readouterr()
    assert "is a file, not a folder" in captured.err
    assert "measure" not in captured.err
    assert out.read_text() == "mine"
