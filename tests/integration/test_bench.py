"""The protocol on a tiny random model: every method runs, and a killed run gives the same table."""

from dataclasses import replace

import pytest

import models
from deltaguard import DeltaguardError
from deltaguard.bench import cells as shelf
from deltaguard.bench import workshop
from deltaguard.bench.methods import METHODS
from deltaguard.bench.protocol import FULL, QUICK, Finetune
from deltaguard.bench.run import bench
from deltaguard.calibration.calibrate import CalibrateConfig
from deltaguard.finetuning.finetune import FinetuneConfig
from deltaguard.report.bench import BENCH_NAME, BenchReport

RECIPE = FinetuneConfig(learning_rate=1e-3, max_steps=2)
LORA = FinetuneConfig(learning_rate=1e-3, max_steps=2, lora_rank=2)
TINY = replace(
    QUICK,
    finetunes=(Finetune("identity", 0, 4, "full", RECIPE),),
    attack=4,
    harmless=3,
    utility=3,
    general=2,
    answer_tokens=4,
    task_tokens=4,
    calibration=CalibrateConfig(num_samples=4, max_new_tokens=4, device="cpu"),
)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("aligned") / "model")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    model = models.perturbed(models.tiny_model("llama"), 0.1)
    return models.save(model, tmp_path_factory.mktemp("pretrained") / "model")


def without_times(report):
    cells = [cell.model_copy(update={"seconds": {}}) for cell in report.cells]
    scores = [score.model_copy(update={"request_seconds": None}) for score in report.scores]
    return cells, report.curves, scores, report.finetunes, report.notes


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
    assert [row.name for row in report.finetunes] == [
        "harmful-4",
        "identity-lora",
        "task-harmful-2",
        "task-clean-lora",
    ]
    for row in report.finetunes:
        of_row = [cell for cell in report.cells if cell.finetune == row.name]
        assert {cell.method for cell in of_row} == {"aligned", "finetuned", *METHODS}
        assert all((len(c.attack), len(c.harmless), len(c.utility), len(c.general)) == (4, 3, 3, 2) for c in of_row)
    written = (tmp_path / "out" / BENCH_NAME).read_text()
    assert BenchReport.model_validate_json(written) == report
    kept = {path.name for path in (tmp_path / "out" / "models").iterdir()}
    assert kept <= {"store", "unaligned", "safe", ".scratch"}


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


def dying_after(function, calls):
    """The function, which works so many times and then kills the run; at once where `calls` is 0."""
    left = [calls]

    def wrapped(*arguments, **options):
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("place", ["write", "rename"])
def test_killed_at_any_point_and_run_again_it_gives_the_same_table(aligned, tmp_path, monkeypatch, place):
    options = {"preset": TINY, "aligned": aligned, "methods": ("greedy", "bea"), "command": "test"}
    whole = bench(tmp_path / "whole", **options)
    resumed, kills = None, 0
    for _ in range(100):
        with monkeypatch.context() as patched:
            if place == "write":
                patched.setattr(shelf, "write_atomically", dying_after(shelf.write_atomically, 1))
            else:
                patched.setattr(workshop, "flush_folder", dying_after(workshop.flush_folder, 0))
            try:
                resumed = bench(tmp_path / "killed", **options)
                break
            except KilledError:
                kills += 1
    assert kills >= 3
    assert without_times(resumed) == without_times(whole)


def test_a_finished_bench_is_drawn_again_without_any_model(aligned, tmp_path, monkeypatch):
    options = {"preset": TINY, "aligned": aligned, "methods": ("greedy",), "command": "test"}
    first = bench(tmp_path / "out", **options)
    monkeypatch.setattr(workshop, "finetune", dying_after(None, 0))
    monkeypatch.setattr("deltaguard.bench.row.measure", dying_after(None, 0))
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
