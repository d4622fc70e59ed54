"""What restores of unknown and of trusted data keep and leave: `python -m benchmarks.trust ALIGNED`.

Fine-tunes of attackers and of a task are restored without options, and with
`--training-data trusted`, and asked on requests on which nothing was chosen. Cells stay in the folder
`--work` and are not measured again. It takes an hour on two CPU cores.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tools.guard import Guards

from deltaguard.device import device_name
from deltaguard.progress import ignore
from deltaguard.reports.records.attacks import AttackCell
from deltaguard.reports.records.base import environment
from deltaguard.studies.attack_run import AttackRun
from deltaguard.studies.attack_score import outcomes
from deltaguard.studies.defences import defences
from deltaguard.studies.describe import attacker_row
from deltaguard.studies.protocol import ATTACKS, BOUND, DEFAULT, Preset
from deltaguard.studies.run import opened
from deltaguard.studies.setting import LIBRARIES, Bench

ATTACKERS, TASK = ("backdoor-100", "jailbreak-100"), "task-harmful-14"
METHOD = "kfac"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("aligned", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/trust.json"))
    parser.add_argument("--work", type=Path, default=Path("build/trust"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--finetune", nargs="+", choices=(*ATTACKERS, TASK), default=(*ATTACKERS, TASK))
    chosen = parser.parse_args(arguments)
    finetunes = (
        *ATTACKS.with_changes(finetunes=ATTACKERS).finetunes,
        *DEFAULT.with_changes(finetunes=[TASK]).finetunes,
    )
    finetunes = tuple(each for each in finetunes if each.name in chosen.finetune)
    preset = replace(ATTACKS, finetunes=finetunes, seeds=tuple(chosen.seeds))
    found = measured(chosen.aligned, chosen.work, preset)
    chosen.output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def measured(aligned: Path, work: Path, preset: Preset) -> Guards:
    """Restore the fine-tunes of a preset for both kinds of data; the method of each outcome is that kind."""
    with opened(work, preset, (METHOD,), aligned=aligned, pretrained=None, attacks=(), progress=ignore) as (
        setting,
        _,
    ):
        cells = [cell for seed in preset.seeds for cell in _cells(setting, seed)]
        attackers = tuple(map(attacker_row, preset.finetunes))
        return Guards(
            environment=environment(device_name(), libraries=LIBRARIES),
            command=f"python -m benchmarks.trust demo/aligned --seeds {' '.join(map(str, preset.seeds))} "
            f"--finetune {' '.join(row.name for row in attackers)}",
            titles={row.name: row.title for row in attackers},
            seeds=preset.seeds,
            outcomes=outcomes(attackers, cells, bound=BOUND),
        )


def _cells(setting: Bench, seed: int) -> list[AttackCell]:
    method, found = defences()[METHOD], list[AttackCell]()
    standard = method.standard
    assert standard is not None, "it restores without options"
    trusted = standard.model_copy(update={"training_data": "trusted"})
    for finetune in setting.preset.finetunes:
        run = AttackRun(setting, finetune, seed)
        found += [run.aligned(), run.finetuned()]
        # Under its own name it is the cell that `deltaguard bench` measures.
        unknown = run.restored(method, standard)
        found.append(unknown.model_copy(update={"method": "unknown"}))
        found.append(run.restored(replace(method, name="trusted"), trusted))
        print(found[-1].model_dump_json(include={"attacker", "seed", "restored_to"}), flush=True)
        run.tidy()
    return found


if __name__ == "__main__":
    main()
