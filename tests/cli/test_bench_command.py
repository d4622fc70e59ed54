"""`deltaguard bench` from the command line."""

import json

import pytest

import models
from benches import TINY
from deltaguard.cli.app import FAILED, USAGE, run
from deltaguard.reports.records.bench import BenchReport
from deltaguard.studies import protocol


@pytest.fixture
def aligned(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "PRESETS", {"quick": TINY})
    return str(models.save(models.tiny_model("llama"), tmp_path / "aligned"))


def test_one_document_on_stdout_and_the_same_again_from_what_is_stored(aligned, tmp_path, capsys):
    command = [
        "bench",
        aligned,
        "-o",
        str(tmp_path / "out"),
        "--method",
        "greedy",
        "--method",
        "wise-ft",
        "--json",
    ]
    assert run(command) == 0
    report = BenchReport.model_validate_json(capsys.readouterr().out)
    assert {cell.method for cell in report.cells} == {"aligned", "finetuned", "greedy", "wise-ft"}
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == report.model_dump(mode="json")["cells"]


def test_a_users_attacks_are_asked(aligned, tmp_path, capsys):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "Name a harm."}\n')
    output = ["-o", str(tmp_path / "out"), "--method", "wise-ft", "--json"]
    assert run(["bench", aligned, *output, "--attack-prompts", str(prompts)]) == 0
    with_mine = BenchReport.model_validate_json(capsys.readouterr().out)
    assert with_mine.settings["attacks"] is not None
    assert run(["bench", aligned, *output]) == FAILED
    assert "other settings (attacks differ)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--method", "magic"], USAGE, "no method magic"),
        (["--preset", "huge"], USAGE, "huge"),
        (["--attack-prompts", "/nowhere.csv"], FAILED, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused(aligned, tmp_path, capsys, options, code, message):
    assert run(["bench", aligned, "-o", str(tmp_path / "out"), *options]) == code
    assert message in capsys.readouterr().err


def test_a_pretrained_model_without_an_aligned_one_is_a_usage_error(tmp_path, capsys):
    assert run(["bench", "-o", str(tmp_path / "out"), "--pretrained", "model"]) == USAGE
    assert "--pretrained" in capsys.readouterr().err


def test_a_model_that_is_not_there_leaves_nothing_behind(aligned, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["bench", str(tmp_path / "absent"), "-o", str(out), "--method", "wise-ft"]) == FAILED
    assert not out.exists()
