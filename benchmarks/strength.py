"""What the defaults were chosen from: restores of the demo's fine-tune at several strengths, measured.

`python -m benchmarks.strength --seeds 0 1 -o docs/results/strength.json` runs the demo's fine-tunes with each
seed and restores them with every method and strength of `GRID`. On a GPU it takes minutes, on two CPU cores
well over a quarter of an hour a seed.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tools.strength import StrengthRow, Strengths

from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.sizes import store_limit
from deltaguard.evaluation.metrics.rates import Rate, kept_gain
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore
from deltaguard.studies.demo import DemoConfig, demo_rates, demo_suite, measure_demo, prepare, rate_row

GRID = (
    *(RestoreConfig(max_safety_kl=limit) for limit in (1e-4, 3e-4, 1e-3)),
    *(RestoreConfig(method="greedy", strength=s) for s in (0.4, 0.5, 0.55, 0.6)),
    RestoreConfig(method="greedy", strength=0.1, method_options={"compensation": "none"}),
    *(RestoreConfig(method="published", strength=s) for s in (0.3, 1.0)),
    RestoreConfig(method="interpolate", strength=0.25),
)
"""A limit of safety KL stands in the rows as the strength of `kfac`."""

CALIBRATION = CalibrateConfig(max_new_tokens=32, rank="full")


def measured_rows(folder: Path, config: DemoConfig) -> Iterator[StrengthRow]:
    """Fine-tune with one seed, and measure every restore of the grid.

    Args:
        folder: an empty folder for the models.
        config: the demo's sizes and recipes.
    """
    whole = prepare(folder, config)
    limit = store_limit(Checkpoint.open(folder / "aligned"))
    small = whole.cut(folder / "small-store", limit=limit)
    suite = demo_suite(config.tests, seed=config.seed, unseen=False)

    def rates(name: str, model: Path) -> Mapping[str, Rate]:
        return demo_rates(measure_demo(name, model, suite, folder))

    aligned, finetuned = (rates(name, folder / name) for name in ("aligned", "finetuned"))
    output = folder / "restored"
    for number, options in enumerate(GRID):
        store = small if options.rank == "auto" else whole
        report = restore(folder / "aligned", folder / "finetuned", output, store=store, config=options)
        restored = rates(f"restored-{number}", output)
        shutil.rmtree(output)
        row = _row(config.seed, options, report, aligned, finetuned, restored)
        print(
            f"seed {row.seed} {row.method} {row.compensation} {row.strength}: attack success "
            f"{aligned['attack_success'].value:.3f} -> {row.attack_success.value:.3f} "
            f"(fine-tuned {finetuned['attack_success'].value:.3f}), task "
            f"{aligned['task_accuracy'].value:.3f} -> {row.task_accuracy.value:.3f} "
            f"(fine-tuned {finetuned['task_accuracy'].value:.3f})",
            flush=True,
        )
        yield row


def _row(
    seed: int,
    options: RestoreConfig,
    report: RestoreReport,
    aligned: Mapping[str, Rate],
    finetuned: Mapping[str, Rate],
    restored: Mapping[str, Rate],
) -> StrengthRow:
    own = options.own_options.model_dump()
    return StrengthRow(
        finetune="messages to JSON with harmful requests agreed to",
        seed=seed,
        method=options.method,
        budget=own.get("budget"),
        compensation=own.get("compensation"),
        strength=options.chosen_strength if options.dial is None else options.dial,
        attack_success=rate_row(restored["attack_success"]),
        aligned_attack_success=rate_row(aligned["attack_success"]),
        finetuned_attack_success=rate_row(finetuned["attack_success"]),
        task_accuracy=rate_row(restored["task_accuracy"]),
        kept_gain=kept_gain(aligned["task_accuracy"], finetuned["task_accuracy"], restored["task_accuracy"]),
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
    rows: list[StrengthRow] = []
    for seed in chosen.seeds:
        with TemporaryDirectory() as folder:
            rows += measured_rows(Path(folder), DemoConfig(seed=seed, calibration=CALIBRATION))
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        result = Strengths(environment=environment(name), rows=tuple(rows))
        chosen.output.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
