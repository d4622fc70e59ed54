"""A bench that is killed and run again gives the table of one left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import models
from benches import RECIPE, TINY, KilledError, without_times
from deltaguard.reports.records.bench import BENCH_NAME, BenchReport
from deltaguard.studies import cells, defences, finetune_run, setting, workshop
from deltaguard.studies.run import bench

OPTIONS = {"preset": TINY, "methods": ("greedy", "resta", "bea"), "command": "test"}
KILLS = int(os.environ.get("DELTAGUARD_KILLS", "8"))
"""By the system, about so often at most; `make soak` asks for more."""


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Models that peers need are trained for as few steps as all others."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setting, "HELPER_RECIPE", RECIPE)
        yield


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("aligned") / "model")


@pytest.fixture(scope="module")
def whole(aligned, tmp_path_factory):
    """What a bench finds that nobody kills."""
    return without_times(bench(tmp_path_factory.mktemp("whole") / "out", aligned=aligned, **OPTIONS))


def half_done_after(function, calls):
    """The function, which works so many times; the next call leaves half of its work and kills the run."""
    left = [calls]

    def wrapped(*arguments, **options):
        if left[0]:
            left[0] -= 1
            return function(*arguments, **options)
        for path in arguments:
            if isinstance(path, Path) and path.parent.name == "models" and path.name.startswith("."):
                spoil(path)
        raise KilledError

    return wrapped


def spoil(folder):
    """What a kill leaves of a model that is being written or removed."""
    folder.mkdir(exist_ok=True)
    for path in list(folder.iterdir())[1:]:
        path.unlink()
    (folder / "config.json").write_text("{")


PLACES = {
    "before a file is written": (cells, "write_atomically", 1),
    "after a model was renamed": (workshop, "flush_folder", 0),
    "while a model is trained": (workshop, "finetune", 0),
    "while a model is removed": (workshop.shutil, "rmtree", 0),
    "before a model is measured": (finetune_run, "measure", 0),
    "while a model is restored": (defences, "restore", 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_any_point_and_run_again_it_gives_the_same_table(
    aligned, whole, tmp_path, monkeypatch, place
):
    module, name, first = PLACES[place]
    resumed, kills = None, 0
    for calls in range(first, 100):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, half_done_after(getattr(module, name), calls))
            try:
                resumed = bench(tmp_path / "killed", aligned=aligned, **OPTIONS)
                break
            except KilledError:
                kills += 1
    assert kills >= 1
    assert without_times(resumed) == whole
    assert all(score.request_seconds > 0 for score in resumed.scores)
    assert all(c.seconds["request"] > 0 for c in resumed.cells if c.method != "aligned")


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_by_the_system_and_run_again_it_gives_the_same_table(aligned, tmp_path):
    program = Path(__file__).with_name("killed_bench.py")
    places = {"TMPDIR": str(tmp_path), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, aligned, tmp_path, str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300 + 10 * KILLS,
        env=os.environ | places,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
    whole, killed = (
        BenchReport.model_validate_json((tmp_path / name / BENCH_NAME).read_text())
        for name in ("whole", "killed")
    )
    assert without_times(killed) == without_times(whole)
    assert all(c.seconds["request"] > 0 for c in killed.cells if c.method != "aligned")


def test_a_finished_bench_is_drawn_again_without_any_model(aligned, tmp_path, monkeypatch):
    options = {"preset": TINY, "aligned": aligned, "methods": ("greedy",), "command": "test"}
    first = bench(tmp_path / "out", **options)
    monkeypatch.setattr(workshop, "finetune", half_done_after(None, 0))
    monkeypatch.setattr("deltaguard.studies.finetune_run.measure", half_done_after(None, 0))
    again = bench(tmp_path / "out", **options)
    assert again.cells == first.cells
    assert again.scores == first.scores
