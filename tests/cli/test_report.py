"""`deltaguard report`: which file of a folder is drawn, and where the page goes."""

import json

import pytest
from pydantic import ValidationError

from bench_reports import bench_report
from deltaguard.cli.app import run
from deltaguard.reports.records.attacks import ATTACKS_NAME, AttacksReport
from deltaguard.reports.records.bench import BENCH_NAME, BenchReport
from deltaguard.reports.records.demo import DEMO_NAME
from deltaguard.reports.records.evaluation import EVALUATION_NAME, EvaluationReport
from reports import evaluation_report
from restores import demo_report


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
    ("name", "schema"),
    [(EVALUATION_NAME, EvaluationReport), (BENCH_NAME, BenchReport), (ATTACKS_NAME, AttacksReport)],
)
def test_a_report_of_another_version_is_refused_by_both_versions(tmp_path, capsys, name, schema):
    (tmp_path / name).write_text(json.dumps({"schema_version": 99, "of_another_time": 1}))
    read = schema.model_fields["schema_version"].default
    assert run(["report", str(tmp_path)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"has schema version 99, and this release reads version {read}" in told
    assert "release that wrote it" in told
    assert not (tmp_path / "report.html").exists()


def test_a_version_alone_is_enough_to_refuse_a_report(tmp_path, capsys):
    content = json.loads(evaluation_report().model_dump_json()) | {"schema_version": 99}
    (tmp_path / EVALUATION_NAME).write_text(json.dumps(content))
    assert run(["report", str(tmp_path)]) == 1
    assert "has schema version 99" in " ".join(capsys.readouterr().err.split())


def test_python_too_reads_no_evaluation_of_another_version():
    content = json.loads(evaluation_report().model_dump_json()) | {"schema_version": 99, "new": 1}
    with pytest.raises(ValidationError, match=r"schema version 99, .* reads version 2") as raised:
        EvaluationReport.model_validate_json(json.dumps(content))
    assert raised.value.error_count() == 1


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (None, "", ("no report", "evaluation.json")),
        (
            EVALUATION_NAME,
            "{}",
            ("evaluation.json cannot be used", "`environment`: Field required", "run that again"),
        ),
        (BENCH_NAME, "not json", ("bench.json cannot be used", "Invalid JSON")),
        (EVALUATION_NAME, "[1]", ("evaluation.json cannot be used", "should be an object")),
    ],
)
def test_a_folder_without_a_readable_report_is_an_error(tmp_path, capsys, name, text, told):
    if name:
        (tmp_path / name).write_text(text)
    assert run(["report", str(tmp_path)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert all(words in message for words in told)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seconds": {"total": -1.0}}, "`seconds.total`: Input should be greater than or equal to 0"),
        ({"seconds": {"total": float("inf")}}, "`seconds.total`: Input should be a finite number"),
        ({"seconds": {"total": 1e200}}, "there is a number beyond 1e+100"),
        ({"models": []}, "`models`: Tuple should have at least 1 item"),
        ({"sections": []}, "measures name 'attack', 'attack/base64', 'attack/prefill', which the report"),
        (
            {"environment": {"created": "yesterday"}},
            "`environment.created`: it is no time in the form",
        ),
        ({"environment": {"created": "0001-01-01T00:00:00+14:00"}}, "it is no time in the form of ISO 8601"),
    ],
)
def test_a_report_that_nothing_measured_can_have_made_is_one_message(tmp_path, capsys, change, told):
    content = json.loads(evaluation_report().model_dump_json())
    for name, value in change.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    (tmp_path / EVALUATION_NAME).write_text(json.dumps(content))
    assert run(["report", str(tmp_path)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert message.count("Error:") == 1
    assert told in message
    assert not (tmp_path / "report.html").exists()


def test_a_bench_says_nothing_of_fine_tunes_that_it_does_not_have(tmp_path, capsys):
    content = json.loads(bench_report(methods=("greedy",)).model_dump_json())
    content["curves"][0]["finetune"] = "other"
    (tmp_path / BENCH_NAME).write_text(json.dumps(content))
    assert run(["report", str(tmp_path)]) == 1
    assert "curves name 'other', which the report does not have" in " ".join(capsys.readouterr().err.split())


def test_a_demo_has_the_three_models_that_can_be_drawn(tmp_path, capsys):
    content = json.loads(demo_report().model_dump_json())
    content["models"][0]["name"] = "other"
    (tmp_path / DEMO_NAME).write_text(json.dumps(content))
    assert run(["report", str(tmp_path)]) == 1
    assert "`models.0.name`: Input should be 'aligned', 'finetuned' or 'restored'" in capsys.readouterr().err
