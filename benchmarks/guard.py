"""What limits of safety KL leave of attacks, and keep of a task: `python -m benchmarks.guard ALIGNED`.

Attackers' fine-tunes and one of a task are restored to one limit after another, without asking the models:
from these the limit is chosen that holds beside the dial's answers for data of unknown origin. Cells stay in
the folder `--work` and are not measured again. It takes an hour on two CPU cores.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tools.guard import Guards

from benchmarks.command import command
from deltaguard.device import device_name
from deltaguard.progress import ignore
from deltaguard.reports.records.attacks import AttackCell
from deltaguard.reports.records.base import environment
from deltaguard.restoration.options import RestoreConfig
from deltaguard.studies.attack_run import AttackRun
from deltaguard.studies.attack_score import outcomes
from deltaguard.studies.defences import defences
from deltaguard.studies.describe import attacker_row
from deltaguard.studies.protocol import ATTACKS, BOUND, DEFAULT, Answers, Preset
from deltaguard.studies.repairs import Repair
from deltaguard.studies.run import opened
from deltaguard.studies.setting import LIBRARIES, Bench

LIMITS = (0.0003, 0.0006, 0.001, 0.003)
ATTACKERS, TASK = ("backdoor-100", "jailbreak-100"), "task-harmful-14"
METHOD = "kfac"
# Backdoors and framings open at once: what an answer opens with is enough, and half of the time.
QUICKER = {
    "attack": 100,
    "harmless": 20,
    "utility": 48,
    "answers": Answers(safety=32, task=48, dtype="bfloat16"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("aligned", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/guard.json"))
    parser.add_argument("--work", type=Path, default=Path("build/guard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    chosen = parser.parse_args(arguments)
    finetunes = (
        *ATTACKS.with_changes(finetunes=ATTACKERS).finetunes,
        *DEFAULT.with_changes(finetunes=[TASK]).finetunes,
    )
    # A limit is chosen by this, so the prompts must be others than those that results are reported on.
    preset = replace(ATTACKS, finetunes=finetunes, seeds=tuple(chosen.seeds), unseen=False, **QUICKER)
    limits = {f"{limit:g}": RestoreConfig(max_safety_kl=limit) for limit in LIMITS}
    told = command("guard", chosen.aligned, "--seeds", *preset.seeds)
    found = measured(chosen.aligned, chosen.work, preset, limits, command=told)
    chosen.output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def measured(
    aligned: Path, work: Path, preset: Preset, settings: Mapping[str, RestoreConfig], *, command: str
) -> Guards:
    """Restore the fine-tunes of a preset with every setting, whose name is the method of its outcomes."""
    with opened(work, preset, (METHOD,), aligned=aligned, pretrained=None, attacks=(), progress=ignore) as (
        setting,
        _,
    ):
        cells = [cell for seed in preset.seeds for cell in _cells(setting, seed, settings)]
        attackers = tuple(map(attacker_row, preset.finetunes))
        return Guards(
            environment=environment(device_name(), libraries=LIBRARIES),
            command=command,
            titles={row.name: row.title for row in attackers},
            seeds=preset.seeds,
            outcomes=outcomes(attackers, cells, bound=BOUND),
        )


def _cells(setting: Bench, seed: int, settings: Mapping[str, RestoreConfig]) -> list[AttackCell]:
    method, found = defences()[METHOD], list[AttackCell]()
    for finetune in setting.preset.finetunes:
        run = AttackRun(setting, finetune, seed)
        found += [run.aligned(), run.finetuned()]
        for name, config in settings.items():
            found.append(run.restored(Repair(name, method, config)))
            print(found[-1].model_dump_json(include={"attacker", "seed", "method"}), flush=True)
        run.tidy()
    return found


if __name__ == "__main__":
    main()
