"""Fine-tunes against a restore without options: train, check, restore, and ask in an attacker's way, too."""

from collections.abc import Sequence
from pathlib import Path

from deltaguard.device import device_name
from deltaguard.evaluation.exchange import Question
from deltaguard.files import expanded
from deltaguard.models.durable import write_atomically
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.attacks import ATTACKS_NAME, AttackCell, AttacksReport
from deltaguard.reports.records.base import environment
from deltaguard.studies.attack_run import AttackRun
from deltaguard.studies.attack_score import outcomes
from deltaguard.studies.describe import attack_notes, attacker_row
from deltaguard.studies.protocol import BOUND, Preset
from deltaguard.studies.repairs import Repair, repairs
from deltaguard.studies.run import opened, spent
from deltaguard.studies.setting import LIBRARIES, Bench

METHODS = ("kfac",)
"""The methods that are run where none is named."""


def bench_attacks(
    output_dir: str | Path,
    *,
    preset: Preset,
    aligned: str | Path | None = None,
    pretrained: str | Path | None = None,
    methods: Sequence[str] | None = None,
    attacks: Sequence[Question] = (),
    command: str = "",
    progress: Progress | None = None,
) -> AttacksReport:
    """Make the fine-tunes of a preset, and say what a check and a restore without options do about each.

    Cells are kept as in `bench`: the same call after a kill goes on with the first one that is missing.

    Args:
        output_dir: receives `attacks.json`, the cells, and while it runs the models.
        preset: how much is run, such as `ATTACKS` or `DEFAULT`.
        aligned: the aligned model; the demo's where absent.
        pretrained: the model it was aligned from, for the methods that need it.
        methods: as `repairs` reads them; `METHODS` where absent.
        attacks: as in `bench`.
        command: what the report says the run was started by.
        progress: told of fine-tunes and cells.

    Returns:
        The report, in the folder too.

    Raises:
        DeltaguardError: as `bench` and `repairs`.
    """
    folder, chosen = expanded(output_dir), repairs(methods or METHODS)
    with opened(
        folder,
        preset,
        tuple(dict.fromkeys(repair.defence.name for repair in chosen)),
        aligned=aligned,
        pretrained=pretrained,
        attacks=attacks,
        progress=progress or ignore,
    ) as (setting, settings):
        usable = [repair for repair in chosen if repair.defence in setting.methods]
        cells = _cells(setting, usable)
        attackers = tuple(map(attacker_row, preset.finetunes))
        report = AttacksReport(
            environment=environment(device_name(), libraries=LIBRARIES),
            preset=preset.name,
            settings=settings,
            aligned=settings["aligned"] or "the demo's aligned model",
            command=command,
            bound=BOUND,
            seeds=preset.seeds,
            attackers=attackers,
            cells=cells,
            outcomes=outcomes(attackers, cells, bound=BOUND),
            notes=attack_notes(setting, usable, cells),
            seconds=spent(setting, [cell.seconds for cell in cells]),
        )
        write_atomically(folder / ATTACKS_NAME, report.model_dump_json(indent=1) + "\n")
    return report


def _cells(setting: Bench, chosen: Sequence[Repair]) -> tuple[AttackCell, ...]:
    """Measure every fine-tune with every seed; models go when their cells are done."""
    found: list[AttackCell] = []
    finetunes = setting.preset.finetunes
    for done, finetune in enumerate(finetunes, start=1):
        most = len(setting.preset.seeds) * (2 + len(chosen))
        for number, seed in enumerate(setting.preset.seeds):
            run = AttackRun(setting, finetune, seed)
            found += [run.aligned(), run.finetuned()]
            found += [run.restored(repair) for repair in chosen]
            run.tidy()
            setting.progress(Event(finetune.name, (number + 1) * (2 + len(chosen)), most))
        setting.progress(Event("fine-tunes", done, len(finetunes)))
    return tuple(found)
