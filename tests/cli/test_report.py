"""`deltaguard report`: which file of a folder is drawn, and where the page goes."""

import json

import pytest

from deltaguard.cli.app import run
from deltaguard.report.bench import BENCH_NAME
from deltaguard.report.evaluation import EVALUATION_NAME
from reports import bench_report, evaluation_report


def test_an_evaluation_is_drawn_into_its_folder(tmp_path, capsys):
    (tmp_path / EVALUATION_NAME).write_text(evaluation_report().model_dump_json())
    assert run(["report", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    page = tmp_path / "report.html"
    assert told == {
        "source": str(tmp_path / EVALUATION_NAME),
        "page": str(page),
        "bytes": page.stat().st_size,
        "left_out": [],
    }
    assert "deltaguard eval" in page.read_text()


def test_of_several_reports_one_is_drawn_and_the_others_are_named(tmp_path, capsys):
    (tmp_path / EVALUATION_NAME).write_text(evaluation_report().model_dump_json())
    (tmp_path / BENCH_NAME).write_text(bench_report(methods=("greedy",)).model_dump_json())
    page = tmp_path / "elsewhere.html"
    assert run(["report", str(tmp_path), "-o", str(page)]) == 0
    captured = capsys.readouterr()
    assert str(page) in captured.out
    assert f"not drawn: {EVALUATION_NAME}" in " ".join(captured.err.split())
    assert "deltaguard bench" in page.read_text()
    assert not (tmp_path / "report.html").exists()


def test_the_same_report_gives_the_same_page(tmp_path):
    (tmp_path / EVALUATION_NAME).write_text(evaluation_report().model_dump_json())
    for name in ("one.html", "two.html"):
        assert run(["report", str(tmp_path), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (None, "", ("no report", "evaluation.json")),
        (EVALUATION_NAME, "{}", ("EvaluationReport", "environment", "Field required")),
        (BENCH_NAME, "not json", ("BenchReport", "Invalid JSON")),
    ],
)
def test_a_folder_without_a_readable_report_is_an_error(tmp_path, capsys, name, text, told):
    if name:
        (tmp_path / name).write_text(text)
    assert run(["report", str(tmp_path)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert all(words in message for words in told)
    assert not (tmp_path / "report.html").exists()
