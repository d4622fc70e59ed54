"""What the documentation shows is true of the program: commands, code and pictures."""

import ast
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from deltaguard.cli.app import build_app
from deltaguard.evaluation.suites.suite import read_suite
from documents import EXAMPLES, PAGES, ROOT, blocks, lines_of, typed
from refusing import few_requests, refusing_pair

SCRIPTS = sorted(EXAMPLES.rglob("*.sh"))


def commands() -> list[str]:
    shown = [line.text for page in PAGES for line in typed(page)]
    scripts = [line for script in SCRIPTS for line in lines_of(script.read_text(encoding="utf-8"))]
    return sorted({line for line in (*shown, *scripts) if line.startswith("deltaguard ")})


@pytest.mark.parametrize("line", commands())
def test_commands_shown_are_commands_of_the_program(line):
    tokens = shlex.split(line, comments=True)[1:]
    for ending in (">", "||", "&"):
        if ending in tokens:
            tokens = tokens[: tokens.index(ending)]
    tokens = [re.sub(r"^\$[\w@]+$", "0.1", token) for token in tokens]
    app = build_app()
    verbs, *_ = app.parse_commands(tokens)
    assert tokens[: len(verbs)] == list(verbs) != []
    app.parse_args(tokens, exit_on_error=False, print_error=False)


def test_code_shown_is_python():
    shown = [code for page in PAGES for code in blocks(page, "python")]
    assert shown
    for code in shown:
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_examples_are_shell_scripts(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("suite", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def test_suites_of_examples_are_suites(suite):
    assert read_suite(suite).sections


def test_the_public_pair_runs_the_commands_that_its_page_shows(tmp_path):
    """With a `deltaguard` that only tells: every command of the page, and models given behind the folder."""
    told = tmp_path / "told"
    program = tmp_path / "deltaguard"
    # As on the way that is expected: the fine-tune needs a restore.
    program.write_text(f'#!/bin/sh\necho "deltaguard $*" >> {told}\ntest "$1" != check || exit 3\n')
    program.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "examples/llama2_gsm8k.sh", "llama2", "other/model"]
    subprocess.run(command, check=True, cwd=ROOT, env=path)
    ran = told.read_text(encoding="utf-8").splitlines()
    asking = [line for line in ran if line.startswith("deltaguard eval ")]
    assert len(asking) == 1
    assert " llama2/restored-by-kl other/model " in asking[0]
    page = (EXAMPLES / "llama2_gsm8k.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith("deltaguard ")]
    assert [line.replace(" other/model", "") for line in ran] == shown


def test_the_python_example_runs(monkeypatch, capsys, tmp_path):
    made = refusing_pair()
    few_requests(monkeypatch)
    script = ROOT / "examples" / "restore.py"
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deltaguard.calibrate", lambda *_, **__: made.store, raising=False)
    monkeypatch.setattr(sys, "argv", [str(script), str(made.aligned), str(made.finetuned), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert f"tensors verified in {tmp_path / 'restored'}" in capsys.readouterr().out
