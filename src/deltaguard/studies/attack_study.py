"""Fine-tunes against a restore without options: train, check, restore, and ask in an attacker's way, too."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaguard.device import device_name
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Question
from deltaguard.files import expanded
from deltaguard.models.durable import write_atomically
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.attacks import ATTACKS_NAME, AttackCell, AttacksReport
from deltaguard.reports.records.base import environment
from deltaguard.restoration.options import RestoreConfig
from deltaguard.studies.attack_run import AttackRun
from deltaguard.studies.attack_score import outcomes
from deltaguard.studies.defences import defences
from deltaguard.studies.describe import attack_notes, attacker_row
from deltaguard.studies.protocol import BOUND, Preset
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
        methods: names out of `defences()`, of restores that need no option; `METHODS` where absent.
        attacks: as in `bench`.
        command: what the report says the run was started by.
        progress: told of fine-tunes and cells.

    Returns:
        The report, in the folder too.

    Raises:
        DeltaguardError: as `bench`, or a method has no default to be run at.
    """
    folder, methods = expanded(output_dir), methods or METHODS
    standard = _standards(methods)
    with opened(
        folder,
        preset,
        methods,
        aligned=aligned,
        pretrained=pretrained,
        attacks=attacks,
        progress=progress or ignore,
    ) as (setting, settings):
        cells = _cells(setting, standard)
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
            notes=attack_notes(setting, cells),
            seconds=spent(setting, [cell.seconds for cell in cells]),
        )
        write_atomically(folder / ATTACKS_NAME, report.model_dump_json(indent=1) + "\n")
    return report


def _standards(methods: Sequence[str]) -> Mapping[str, RestoreConfig]:
    """Find what each method does without options; names that are unknown are left to `opened`."""
    known = {name: defences()[name].standard for name in methods if name in defences()}
    found = {name: config for name, config in known.items() if config is not None}
    if lacking := [name for name in known if name not in found]:
        usable = ", ".join(method.name for method in defences().values() if method.standard is not None)
        raise DeltaguardError(
            f"Fine-tunes meet a restore without options here, and {', '.join(lacking)} cannot be run so. "
            f"These can: {usable}."
        )
    return found


def _cells(setting: Bench, standard: Mapping[str, RestoreConfig]) -> tuple[AttackCell, ...]:
    """Measure every fine-tune with every seed; models go when their cells are done."""
    found: list[AttackCell] = []
    finetunes = setting.preset.finetunes
    for done, finetune in enumerate(finetunes, start=1):
        most = len(setting.preset.seeds) * (2 + len(setting.methods))
        for number, seed in enumerate(setting.preset.seeds):
            run = AttackRun(setting, finetune, seed)
            found += [run.aligned(), run.finetuned()]
            found += [run.restored(method, standard[method.name]) for method in setting.methods]
            run.tidy()
            setting.progress(Event(finetune.name, (number + 1) * (2 + len(setting.methods)), most))
        setting.progress(Event("fine-tunes", done, len(finetunes)))
    return tuple(found)
