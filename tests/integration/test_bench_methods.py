"""Every method of a bench, on a tiny model that is trained and measured."""

from dataclasses import replace

import pytest

import models
from benches import LORA, RECIPE, TINY
from deltaguard.reports.records.bench import BENCH_NAME, BenchReport
from deltaguard.studies import defences
from deltaguard.studies.protocol import Finetune
from deltaguard.studies.run import bench

KINDS = {
    "harmful-4": Finetune("harmful", 4, 0, "full", RECIPE),
    "identity-lora": Finetune("identity", 0, 4, "lora", LORA),
    "task-harmful-2": Finetune("task-harmful", 2, 4, "full", RECIPE),
    "task-clean-lora": Finetune("task-clean", 0, 4, "lora", LORA),
}


# Of the methods that train, one is enough for the two kinds that differ by their data alone.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kinds", "methods"),
    [
        (("identity-lora", "task-harmful-2"), tuple(defences.defences())),
        (("harmful-4", "task-clean-lora"), ("wise-ft", "bea")),
    ],
    ids=["every method", "every kind"],
)
def test_every_method_runs_and_so_does_every_kind_of_fine_tune(kinds, methods, tmp_path):
    aligned = models.save(models.tiny_model("llama"), tmp_path / "aligned")
    pretrained = models.save(models.perturbed(models.tiny_model("llama"), 0.1), tmp_path / "pretrained")
    preset = replace(TINY, finetunes=tuple(KINDS[kind] for kind in kinds), probes=1)
    options = {"preset": preset, "aligned": aligned, "pretrained": pretrained, "command": "test"}
    report = bench(tmp_path / "out", methods=methods, **options)
    assert tuple(finetune.name for finetune in report.finetunes) == kinds
    for finetune in report.finetunes:
        of_row = [cell for cell in report.cells if cell.finetune == finetune.name]
        assert {cell.method for cell in of_row} == {"aligned", "finetuned", *methods}
        assert {(len(c.attack), len(c.harmless), len(c.general)) for c in of_row} == {(4, 3, 2)}
        is_task = finetune.name.startswith("task")
        assert {len(c.utility) for c in of_row} == {3 if is_task else 2}
        assert {c.mean_utility.interval for c in of_row} == {"wilson" if is_task else "bootstrap"}
    assert {"trl", "accelerate", "datasets"} <= report.environment.versions.keys()
    written = (tmp_path / "out" / BENCH_NAME).read_text()
    assert BenchReport.model_validate_json(written) == report
    spent = sum(cell.seconds[name] for cell in report.cells for name in ("request", "measure"))
    made_once = report.seconds.keys() & {"store", "store-whole", "unaligned", "safe"}
    assert len(made_once) == (4 if "greedy" in methods else 0)
    assert report.seconds["total"] == pytest.approx(spent + sum(report.seconds[name] for name in made_once))
    kept = {path.name for path in (tmp_path / "out" / "models").iterdir()}
    assert kept <= {*made_once, ".scratch"}
