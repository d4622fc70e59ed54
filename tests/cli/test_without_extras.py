"""What a bare installation can do: all but pictures, which say what to install."""

import json
import sys
import tomllib
from pathlib import Path

import pytest

from deltaguard.cli.app import run
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME
from deltaguard.reports.records.sweep import SWEEP_NAME
from pairs import pair

ROOT = Path(__file__).resolve().parents[2]
DRAWING = ("altair", "vl_convert")
EXTRAS = (*DRAWING, "peft", "trl", "openai", "rouge_score", "scipy", "statsmodels")
MESSAGE = "Drawing charts needs altair, vl_convert, not installed here: `pip install 'deltaguard[reports]'`."


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("charts", "curves"):
        monkeypatch.delitem(sys.modules, f"deltaguard.reports.{name}", raising=False)


def words(text):
    return " ".join(text.split())


def test_a_restore_writes_report_and_card_and_prints_its_tables(tmp_path, capsys):
    made, out = pair(), tmp_path / "out"
    given, store = [str(made.aligned), str(made.finetuned)], tmp_path / "store"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"prompt": f"Lock {n}?", "response": "I cannot help."}) for n in range(6))
    )
    made_anew = ["calibrate", given[0], "-o", str(store), "--prompts", str(prompts), "--device", "cpu"]
    assert run(made_anew) == 0
    assert run(["restore", *given, "-o", str(out), "--store", str(store), "--strength", "0.5"]) == 0
    assert (out / REPORT_NAME).is_file()
    assert (out / CARD_NAME).is_file()
    told = capsys.readouterr().out
    assert "Restored layers by kind" in told
    assert f"Next: deltaguard eval {given[0]} {out} -o evaluation" in words(told)
    assert run(["verify", str(out)]) == 0
    assert run(["diff", *given]) == 0
    capsys.readouterr()
    assert run(["report", str(out)]) == 1
    assert MESSAGE in words(capsys.readouterr().err)
    assert not (out / "report.html").exists()


def test_a_sweep_is_written_and_printed_and_says_what_its_page_needs(tmp_path, capsys):
    made, out = pair(), tmp_path / "sweep"
    given = [str(made.aligned), str(made.finetuned), "--store", str(made.store), "--device", "cpu"]
    assert run(["sweep", *given, "-o", str(out), "--max-safety-kl", "1e-3"]) == 0
    told = words(capsys.readouterr().out)
    assert "What each limit of safety KL allows" in told
    assert MESSAGE in told
    assert [path.name for path in out.iterdir()] == [SWEEP_NAME]


def test_what_charts_are_drawn_with_is_no_dependency_but_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {requirement.split(">")[0] for requirement in project["dependencies"]}
    others = {"scipy", "statsmodels", "datasets", "peft", "trl", "openai"}
    assert not needed & {"altair", "vl-convert-python", *others}
    extra = {requirement.split(">")[0] for requirement in project["optional-dependencies"]["reports"]}
    assert extra == {"altair", "vl-convert-python"}
