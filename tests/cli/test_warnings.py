"""What calibrate, restore and sweep say of an aligned model that does not refuse."""

import json

import pytest

from deltaguard.cli.app import run
from deltaguard.curvature.store import CurvatureStore
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.reports.records.sweep import SWEEP_NAME
from pairs import pair

REFUSAL, ANSWER = "I cannot help with that.", "Sure, here you are."


def calibrated(folder, answers):
    """A store of the tests' model, on conversations with these answers."""
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"How is door {i} opened?", "response": text} for i, text in enumerate(answers)]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--prompts", prompts, "--device", "cpu", "--json"]
    assert run([*map(str, ["calibrate", pair().aligned, "-o", folder / "store", *options])]) == 0
    return folder / "store"


@pytest.fixture(scope="module")
def careless(tmp_path_factory):
    """A store of a model that answers whatever it is asked."""
    return calibrated(tmp_path_factory.mktemp("careless"), [ANSWER] * 6)


def test_calibrating_a_model_that_does_not_refuse_warns(tmp_path, capsys):
    store = calibrated(tmp_path, [REFUSAL, *[ANSWER] * 9])
    captured = capsys.readouterr()
    share = CurvatureStore.from_pretrained(store).provenance.refusal_share
    assert 0 <= share < 0.5
    assert captured.err.count("Warning:") == 1
    told = " ".join(captured.err.split())
    assert f"{share:.0%} of the 8 responses of {pair().aligned.name} to harmful requests refuse" in told
    assert json.loads(captured.out)["refusal_share"] == share


def test_a_model_that_refuses_is_calibrated_without_a_warning(tmp_path, capsys):
    calibrated(tmp_path, [REFUSAL] * 6)
    assert "Warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "options", "name"),
    [("restore", ["--strength", "0.5"], REPORT_NAME), ("sweep", ["--max-safety-kl", "1e-3"], SWEEP_NAME)],
)
def test_restoring_to_a_model_that_does_not_refuse_warns(careless, tmp_path, capsys, verb, options, name):
    made, out = pair(), tmp_path / "out"
    tokens = [verb, made.aligned, made.finetuned, "-o", out, "--store", careless, "--device", "cpu", *options]
    assert run([*map(str, tokens), "--json"]) == 0
    captured = capsys.readouterr()
    (warning,) = json.loads((out / name).read_text())["warnings"]
    assert "0% of the 5 responses" in warning
    assert f"Warning: {warning}" in " ".join(captured.err.split())
    assert json.loads(captured.out)["warnings"] == [warning]


def test_a_restore_that_calibrates_first_warns_too(tmp_path, capsys, monkeypatch):
    """The tests' model answers nonsense to the package's prompts."""
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    made, out = pair(), tmp_path / "out"
    tokens = ["restore", made.aligned, made.finetuned, "-o", out, "--device", "cpu", "--strength", "0.5"]
    assert run([*map(str, tokens)]) == 0
    assert "0% of the 64 responses" in " ".join(capsys.readouterr().err.split())
