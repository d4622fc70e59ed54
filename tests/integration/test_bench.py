"""The protocol on a tiny random model: every method runs, and a killed run gives the same table."""

from dataclasses import replace
from pathlib import Path

import pytest

import models
from benches import LORA, RECIPE, TINY
from deltaguard import DeltaguardError
from deltaguard.bench import cells, methods, row, workshop
from deltaguard.bench.methods import METHODS
from deltaguard.bench.protocol import FULL, QUICK, Finetune
from deltaguard.bench.run import bench
from deltaguard.report.bench import BENCH_NAME, BenchReport


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("aligned") / "model")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    model = models.perturbed(models.tiny_model("llama"), 0.1)
    return models.save(model, tmp_path_factory.mktemp("pretrained") / "model")


def without_times(report):
    measured = [cell.model_copy(update={"seconds": {}}) for cell in report.cells]
    scores = [score.model_copy(update={"request_seconds": None}) for score in report.scores]
    return measured, report.curves, scores, report.finetunes, report.notes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_method_runs_on_every_kind_of_fine_tune(aligned, pretrained, tmp_path):
    preset = replace(
        TINY,
        finetunes=(
            Finetune("harmful", 4, 0, "full", RECIPE),
            Finetune("identity", 0, 4, "lora", LORA),
            Finetune("task-harmful", 2, 4, "full", RECIPE),
            Finetune("task-clean", 0, 4, "lora", LORA),
        ),
        probes=1,
    )
    report = bench(tmp_path / "out", preset=preset, aligned=aligned, pretrained=pretrained, command="test")
    assert [finetune.name for finetune in report.finetunes] == [
        "harmful-4",
        "identity-lora",
        "task-harmful-2",
        "task-clean-lora",
    ]
    for finetune in report.finetunes:
        of_row = [cell for cell in report.cells if cell.finetune == finetune.name]
        assert {cell.method for cell in of_row} == {"aligned", "finetuned", *METHODS}
        assert {(len(c.attack), len(c.harmless), len(c.general)) for c in of_row} == {(4, 3, 2)}
        assert {len(c.utility) for c in of_row} == {3 if finetune.name.startswith("task") else 2}
    written = (tmp_path / "out" / BENCH_NAME).read_text()
    assert BenchReport.model_validate_json(written) == report
    spent = sum(cell.seconds[name] for cell in report.cells for name in ("request", "measure"))
    once = sum(report.seconds[name] for name in ("store", "unaligned", "safe"))
    assert report.seconds["total"] == pytest.approx(spent + once)
    kept = {path.name for path in (tmp_path / "out" / "models").iterdir()}
    assert kept <= {"store", "unaligned", "safe", ".scratch"}


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


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


KILLS = {
    "before a file is written": (cells, "write_atomically", 1),
    "after a model was renamed": (workshop, "flush_folder", 0),
    "while a model is trained": (workshop, "finetune", 0),
    "while a model is removed": (workshop.shutil, "rmtree", 0),
    "before a model is measured": (row, "measure", 0),
    "while a model is restored": (methods, "restore", 0),
    "while a peer's model is written": (methods, "write_peer", 0),
}


@pytest.mark.parametrize("place", KILLS)
def test_killed_at_any_point_and_run_again_it_gives_the_same_table(aligned, tmp_path, monkeypatch, place):
    options = {"preset": TINY, "aligned": aligned, "methods": ("greedy", "resta", "bea"), "command": "test"}
    whole = bench(tmp_path / "whole", **options)
    module, name, first = KILLS[place]
    resumed, kills = None, 0
    for calls in range(first, 100):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, half_done_after(getattr(module, name), calls))
            try:
                resumed = bench(tmp_path / "killed", **options)
                break
            except KilledError:
                kills += 1
    assert kills >= 1
    assert without_times(resumed) == without_times(whole)
    assert all(score.request_seconds > 0 for score in resumed.scores)
    assert all(c.seconds["request"] > 0 for c in resumed.cells if c.method != "aligned")


def test_a_finished_bench_is_drawn_again_without_any_model(aligned, tmp_path, monkeypatch):
    options = {"preset": TINY, "aligned": aligned, "methods": ("greedy",), "command": "test"}
    first = bench(tmp_path / "out", **options)
    monkeypatch.setattr(workshop, "finetune", half_done_after(None, 0))
    monkeypatch.setattr("deltaguard.bench.row.measure", half_done_after(None, 0))
    again = bench(tmp_path / "out", **options)
    assert again.cells == first.cells
    assert again.scores == first.scores


def test_other_settings_in_the_same_folder_are_refused(aligned, tmp_path):
    (tmp_path / "out").mkdir()
    options = {"aligned": aligned, "methods": ("greedy",)}
    bench(tmp_path / "out", preset=TINY, **options)
    with pytest.raises(DeltaguardError, match=r"other settings \(preset differ\)"):
        bench(tmp_path / "out", preset=replace(TINY, seeds=(1,)), **options)


def test_methods_without_their_models_are_left_out_and_named(aligned, tmp_path):
    options = {"preset": replace(TINY, probes=1), "aligned": aligned}
    report = bench(tmp_path / "out", methods=("greedy", "safe-lora"), **options)
    assert {cell.method for cell in report.cells} == {"aligned", "finetuned", "greedy"}
    assert any("Safe LoRA" in note for note in report.notes)
    with pytest.raises(DeltaguardError, match="no method magic"):
        bench(tmp_path / "other", methods=("magic",), **options)


def test_the_full_preset_covers_the_protocol():
    harmful = [f.harmful for f in FULL.finetunes if f.kind == "harmful" and f.training == "full"]
    assert harmful == [50, 100, 150, 200, 1_000, 10_000]
    assert {f.kind for f in FULL.finetunes if f.training == "lora"} == {f.kind for f in QUICK.finetunes}
    assert len(FULL.seeds) >= 3
    assert FULL.attack >= 500
    assert QUICK.attack >= 150
    assert len({f.name for f in FULL.finetunes}) == len(FULL.finetunes)


def test_a_model_that_changed_in_place_is_noticed(tmp_path):
    model = models.save(models.tiny_model("llama"), tmp_path / "model")
    options = {"preset": TINY, "aligned": model, "methods": ("greedy",)}
    bench(tmp_path / "out", **options)
    models.save(models.tiny_model("llama", seed=1), model)
    with pytest.raises(DeltaguardError, match=r"other models or libraries \(aligned differ\)"):
        bench(tmp_path / "out", **options)
