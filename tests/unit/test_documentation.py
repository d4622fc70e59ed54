"""What the documentation shows is true of the program: commands, code and pictures."""

import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deltaguard.cli.app import build_app
from refusing import refusing_pair

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "results" / "index.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[str]:
    found = [block for page in PAGES for block in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [code for language, code in found if language in languages]


def commands() -> list[str]:
    scripts = [*blocks("bash", "console"), (ROOT / "examples" / "restore.sh").read_text(encoding="utf-8")]
    lines = "\n".join(scripts).replace("\\\n", " ").split("\n")
    stripped = (line.strip().removeprefix("$ ") for line in lines)
    return sorted({line for line in stripped if line.startswith("deltaguard ")})


@pytest.mark.parametrize("line", commands())
def test_commands_shown_are_commands_of_the_program(line):
    tokens = shlex.split(line, comments=True)[1:]
    if ">" in tokens:
        tokens = tokens[: tokens.index(">")]
    tokens = [re.sub(r"^\$\w+$", "0.1", token) for token in tokens]
    command, *_ = build_app().parse_args(tokens, exit_on_error=False, print_error=False)
    assert command.__name__ == tokens[0]


def test_code_shown_is_python():
    assert blocks("python")
    for code in blocks("python"):
        assert ast.parse(code).body


def test_every_verb_is_in_the_command_reference(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reference = importlib.import_module("_ext.commands").reference()
    verbs = [name for name in build_app() if not name.startswith("-")]
    assert verbs
    for verb in verbs:
        assert f"## deltaguard {verb}\n" in reference


@pytest.mark.parametrize("name", ["architecture", "one_layer"])
def test_pictures_are_what_their_scripts_draw(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT))
    drawn = importlib.import_module(f"docs.figures.{name}").draw()
    assert drawn == (ROOT / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_shell_example_is_a_shell_script():
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "restore.sh")], check=True)


def test_the_python_example_runs(monkeypatch, capsys, tmp_path):
    made = refusing_pair()
    script = ROOT / "examples" / "restore.py"
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deltaguard.calibrate", lambda *_, **__: made.store, raising=False)
    monkeypatch.setattr(sys, "argv", [str(script), str(made.aligned), str(made.finetuned), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert f"tensors verified in {tmp_path / 'restored'}" in capsys.readouterr().out
