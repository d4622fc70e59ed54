"""What the defaults were chosen from: restores of the demo's fine-tune at several strengths, measured.

`python -m benchmarks.strength --seeds 0 1 -o docs/results/strength.json` runs the demo's fine-tunes with each
seed and restores them with every method and strength of `GRID`. On a GPU it takes minutes, on two CPU cores
well over a quarter of an hour a seed.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tools.readme import StrengthRow, Strengths

from deltaguard.curvature.calibrate import CalibrateConfig, store_limit
from deltaguard.evaluation.measure import Measurement, measure
from deltaguard.evaluation.metrics.rates import kept_gain
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore
from deltaguard.studies.demo import DemoConfig, prepare, rate_row, test_set

GRID = (
    *(RestoreConfig(max_safety_kl=limit) for limit in (1e-4, 3e-4, 1e-3)),
    *(RestoreConfig(method="greedy", strength=s) for s in (0.4, 0.5, 0.55, 0.6)),
    RestoreConfig(method="greedy", strength=0.1, compensation="none"),
    *(RestoreConfig(method="published", strength=s) for s in (0.3, 1.0)),
    RestoreConfig(method="interpolate", strength=0.25),
)
"""A limit of safety KL stands in the rows as the strength of `kfac`."""

CALIBRATION = CalibrateConfig(max_new_tokens=32, rank="full")


def measured_rows(folder: Path, config: DemoConfig, device: str) -> Iterator[StrengthRow]:
    """Fine-tune with one seed, and measure every restore of the grid.

    Args:
        folder: an empty folder for the models.
        config: the demo's sizes and recipes.
        device: where the models run.
    """
    whole = prepare(folder, config)
    limit = store_limit(Checkpoint.open(folder / "aligned"))
    small = whole.cut(folder / "small-store", limit=limit)
    tests = test_set(config.tests, seed=config.seed)
    aligned, finetuned = (measure(folder / name, tests, device=device) for name in ("aligned", "finetuned"))
    output = folder / "restored"
    for options in GRID:
        store = small if options.rank == "auto" else whole
        report = restore(folder / "aligned", folder / "finetuned", output, store=store, config=options)
        restored = measure(output, tests, device=device)
        shutil.rmtree(output)
        row = _row(config.seed, options, report, aligned, finetuned, restored)
        print(
            f"seed {row.seed} {row.method} {row.compensation} {row.strength}: attack success "
            f"{aligned.attack_success.value:.3f} -> {row.attack_success.value:.3f} "
            f"(fine-tuned {finetuned.attack_success.value:.3f}), task {aligned.task_accuracy.value:.3f} -> "
            f"{row.task_accuracy.value:.3f} (fine-tuned {finetuned.task_accuracy.value:.3f})",
            flush=True,
        )
        yield row


def _row(
    seed: int,
    options: RestoreConfig,
    report: RestoreReport,
    aligned: Measurement,
    finetuned: Measurement,
    restored: Measurement,
) -> StrengthRow:
    greedy = options.method == "greedy"
    return StrengthRow(
        finetune="messages to JSON with harmful requests agreed to",
        seed=seed,
        method=options.method,
        budget=options.budget if greedy else None,
        compensation=options.compensation if greedy else None,
        strength=options.chosen_strength if options.dial is None else options.dial,
        attack_success=rate_row(restored.attack_success),
        aligned_attack_success=rate_row(aligned.attack_success),
        finetuned_attack_success=rate_row(finetuned.attack_success),
        task_accuracy=rate_row(restored.task_accuracy),
        kept_gain=kept_gain(aligned.task_accuracy, finetuned.task_accuracy, restored.task_accuracy),
        safety_cost=report.safety_cost,
        kept_energy=report.kept_energy,
        kept_entries=report.kept_entries,
    )


def main() -> None:
    """Run the seeds and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/strength.json"))
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[StrengthRow] = []
    for seed in chosen.seeds:
        with TemporaryDirectory() as folder:
            rows += measured_rows(Path(folder), DemoConfig(seed=seed, calibration=CALIBRATION), device)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        result = Strengths(environment=environment(name), rows=tuple(rows))
        chosen.output.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
