"""What look-alikes in the calibration do: `python -m benchmarks.look_alikes ALIGNED`.

An identity shift and a task are restored without options, once by a store of harmful requests alone and once
by one of harmless look-alikes, too. Cells stay in the folder `--work` and are not measured again. It takes
half an hour on two CPU cores.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tools.look_alikes import Variant, Variants

from benchmarks.command import command
from deltaguard.studies.attack_study import bench_attacks
from deltaguard.studies.protocol import DEFAULT, Preset

FINETUNES = ("identity", "task-clean")
CALIBRATIONS = {"alone": ("harmful requests alone", 0), "beside": ("harmful requests and look-alikes", None)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("aligned", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/look_alikes.json"))
    parser.add_argument("--work", type=Path, default=Path("build/look-alikes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    chosen = parser.parse_args(arguments)
    # It decided what calibration asks, so the prompts are others than those that results are reported on.
    preset = replace(DEFAULT.with_changes(finetunes=FINETUNES), seeds=tuple(chosen.seeds), unseen=False)
    told = command("look_alikes", chosen.aligned, "--seeds", *chosen.seeds)
    found = compared(chosen.aligned, chosen.work, preset, command=told)
    chosen.output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def compared(aligned: Path, work: Path, preset: Preset, *, command: str) -> Variants:
    """Restore the fine-tunes of a preset by stores of both kinds."""
    variants: list[Variant] = []
    for name, (calibration, count) in CALIBRATIONS.items():
        config = preset.calibration.model_copy(update={"num_look_alikes": count})
        report = bench_attacks(
            work / name,
            preset=replace(preset, calibration=config),
            aligned=aligned,
            command=command,
        )
        variants.append(Variant(calibration=calibration, report=report))
    return Variants(variants=tuple(variants))


if __name__ == "__main__":
    main()
