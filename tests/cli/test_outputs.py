"""Where the verbs write: into folders of their own and over pages of their own, in full or not at all."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from deltaguard import RestoreConfig, restore, verify
from deltaguard.cli.app import run
from deltaguard.models import durable
from deltaguard.models.durable import lock_folder
from deltaguard.reports.records.evaluation import EVALUATION_NAME
from pairs import pair
from reports import evaluation_report, sweep_report
from suites import server, suite_file

FEW = """
name: few
decoding: {max_new_tokens: 4}
judges: [{kind: opening}]
sections:
  - {name: attack, kind: attack, builtin: attack, count: 3}
"""


def state_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_the_home_folder_is_meant_however_an_option_is_written(tmp_path, monkeypatch, capsys):
    made = pair()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.yaml").write_text(FEW)
    verbs = {
        "restore": ["restore", made.aligned, made.finetuned, f"--store={made.store}", "--strength=0.5"],
        "eval": ["eval", made.aligned, "--suite=~/few.yaml", "--device=cpu"],
        "sweep": ["sweep", made.aligned, made.finetuned, f"--store={made.store}", "--max-safety-kl=1e-3"],
    }
    for verb, command in verbs.items():
        assert run([*map(str, command), f"--output=~/{verb}"]) == 0, capsys.readouterr().err
        assert (tmp_path / verb).is_dir()
    assert run(["report", "~/sweep", "--output=~/page.html"]) == 0
    assert (tmp_path / "page.html").is_file()
    assert not (tmp_path / "~").exists()


def test_the_home_of_a_user_that_there_is_not_is_a_name_like_any_other(tmp_path, monkeypatch, capsys):
    made = pair()
    monkeypatch.chdir(tmp_path)
    command = ["restore", made.aligned, made.finetuned, "--store", made.store, "--strength=0.5"]
    assert run([*map(str, command), "-o", "~nobody-of-that-name/out"]) == 0, capsys.readouterr().err
    assert (tmp_path / "~nobody-of-that-name" / "out" / "model.safetensors").is_file()


def test_what_lies_in_the_home_folder_is_verified_from_python(tmp_path, monkeypatch):
    made = pair()
    monkeypatch.setenv("HOME", str(tmp_path))
    restore(made.aligned, made.finetuned, "~/out", store=made.store, config=RestoreConfig(strength=0.5))
    assert verify("~/out").passed


def commands(out):
    """Each verb that writes results, into a folder."""
    made = pair()
    models = [str(made.aligned), str(made.finetuned)]
    return {
        "eval": ["eval", *models, "-o", str(out), "--device", "cpu"],
        "sweep": ["sweep", *models, "-o", str(out), "--store", str(made.store), "--device", "cpu"],
        "bench": ["bench", models[0], "-o", str(out)],
        "demo": ["demo", "-o", str(out)],
    }


def refused(tokens, capsys):
    assert run(tokens) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    # Stages begin with a line of their own.
    assert "..." not in captured.err.replace(", ...", "")
    return " ".join(captured.err.split())


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    made, out = pair(), tmp_path_factory.mktemp("restored") / "out"
    tokens = ["restore", made.aligned, made.finetuned, "-o", out, "--store", made.store, "--strength", 0.5]
    assert run([*map(str, tokens)]) == 0
    return out


@pytest.mark.parametrize("verb", ["eval", "sweep", "bench", "demo"])
def test_results_do_not_go_into_a_folder_of_something_else(restored, verb, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(restored, model)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("years of work")
    before = state_of(tmp_path)
    assert "config.json" in refused(commands(model)[verb], capsys)
    assert "holds README.md" in refused(commands(mine)[verb], capsys)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("verb", ["eval", "sweep", "bench"])
def test_results_do_not_go_into_an_input(verb, tmp_path, capsys):
    made = pair()
    before = state_of(made.aligned.parent)
    for out in (made.aligned, made.aligned / "results", made.aligned.parent):
        assert f"the input {made.aligned}" in refused(commands(out)[verb], capsys)
    assert state_of(made.aligned.parent) == before


def test_a_sweep_knows_of_a_page_that_is_not_its_own_before_it_measures(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text(sweep_report().model_dump_json())
    (tmp_path / "report.html").write_text("<h1>Mine</h1>")
    assert "no page that deltaguard drew" in refused(commands(tmp_path)["sweep"], capsys)
    assert (tmp_path / "report.html").read_text() == "<h1>Mine</h1>"


@pytest.mark.parametrize("verb", ["eval", "sweep", "bench", "demo"])
def test_two_runs_exclude_each_other_from_an_output(verb, tmp_path, capsys):
    lock = lock_folder(tmp_path)
    try:
        assert "Another process is working" in refused(commands(tmp_path)[verb], capsys)
    finally:
        os.close(lock)


@pytest.mark.parametrize("name", ["report.html", "elsewhere.html"])
def test_a_page_replaces_a_page_and_nothing_else(name, tmp_path, capsys):
    (tmp_path / EVALUATION_NAME).write_text(evaluation_report().model_dump_json())
    page = tmp_path / name
    tokens = ["report", str(tmp_path), *(["-o", str(page)] if name != "report.html" else [])]
    for _ in range(2):
        assert run(tokens) == 0
    capsys.readouterr()
    drawn = page.read_bytes()
    page.write_text("<h1>Mine</h1>")
    assert "no page that deltaguard drew" in refused(tokens, capsys)
    assert page.read_text() == "<h1>Mine</h1>"
    page.unlink()
    page.symlink_to(tmp_path / EVALUATION_NAME)
    assert "no page that deltaguard drew" in refused(tokens, capsys)
    page.unlink()
    assert run(tokens) == 0
    assert page.read_bytes() == drawn


@pytest.mark.parametrize("before", [None, "drawn"])
def test_a_full_disk_leaves_the_page_of_before(before, tmp_path, monkeypatch, capsys):
    (tmp_path / EVALUATION_NAME).write_text(evaluation_report().model_dump_json())
    if before:
        assert run(["report", str(tmp_path)]) == 0
    capsys.readouterr()
    state = state_of(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    assert "There is no space left" in refused(["report", str(tmp_path)], capsys)
    assert state_of(tmp_path) == state


def test_an_evaluation_that_failed_before_its_first_answer_goes_on(tmp_path, capsys):
    out, suite = tmp_path / "out", suite_file(tmp_path, FEW)
    working = []
    with server(lambda _: (200, "Sure.") if working else (400, "not yet")) as url:
        tokens = ["eval", "m", "-o", str(out), "--suite", str(suite), "--engine", "openai", "--base-url", url]
        assert run(tokens) == 1
        assert "not yet" in capsys.readouterr().err
        assert not (out / EVALUATION_NAME).exists()
        working.append(True)
        assert run(tokens) == 0
    assert (out / EVALUATION_NAME).is_file()


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[4])
from killed_writer import kill_at
import openai
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.evaluate import evaluate
out, suite, url = sys.argv[1:4]
def ran(step, number):
    child = os.fork()
    if child == 0:
        kill_at(step)
        evaluate(["m"], f"{out}/{number}", suite=suite, engine=EngineConfig("openai", base_url=url))
        os._exit(0)
    return os.waitpid(child, 0)[1]
for number in range(5):
    assert os.WIFSIGNALED(ran(number, number)), number
    assert ran(10**9, number) == 0, number
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_evaluation_that_was_killed_as_it_began_goes_on(tmp_path, request):
    helpers = request.config.rootpath / "tests" / "integration"
    with server(lambda _: (200, "Sure.")) as url:
        arguments = [tmp_path / "out", suite_file(tmp_path, FEW), url, helpers]
        command = [sys.executable, "-c", KILLED, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob(f"*/{EVALUATION_NAME}"))) == 5
