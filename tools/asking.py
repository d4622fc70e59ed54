"""Restores that measured attack success, as one small file: `python -m tools.asking NAME=FOLDER ... -o FILE`.

Each folder is one that `deltaguard restore --max-added-attack-success` wrote. What its report says of single
tensors and files, and where the models lay, is left out. `asking_table` draws a table of the documentation.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from deltaguard.reports.records.dial import AttackDial, Dial, Look
from deltaguard.reports.records.restore import REPORT_NAME, RestoreReport
from deltaguard.reports.table import Cell, Column, Table
from deltaguard.reports.text import DASH, duration, nats, percent, points
from tools.checks import rates
from tools.runs import Run, Runs, collect
from tools.tables import made_with, small

AskingRuns = Runs[RestoreReport]
"""`docs/results/asking.json`."""


def asking_table(content: str) -> str:
    """Draw what each restore found and kept: a row a restore.

    Args:
        content: an `AskingRuns` as JSON.

    Returns:
        Markdown.
    """
    runs = AskingRuns.model_validate_json(content).runs
    drawn = Table.of(
        "",
        [_Row.of(run) for run in runs],
        (
            (Column("fine-tune", "words"), lambda row: row.run.finetune),
            (Column("training data", "name"), lambda row: row.attack.training_data or DASH),
            ("attack success,\nfine-tuned", lambda row: rates(row.attack.finetuned.attack_success)),
            ("restored", lambda row: rates(row.attack.restored.attack_success)),
            ("false refusals,\nadded points", lambda row: _added(row.attack.restored)),
            ("safety KL,\nrestored", lambda row: nats(row.dial.restored_kl)),
            ("energy kept", lambda row: percent(row.run.report.kept_energy)),
            ("candidates\nasked", lambda row: str(len(row.attack.looks))),
            ("time", lambda row: Cell(duration(row.run.report.seconds["total"]))),
        ),
    ).markdown()
    return f"{drawn}\n\n{small(made_with(*(run.report.environment for run in runs)))}"


class _Row(BaseModel):
    run: Run[RestoreReport]
    dial: Dial
    attack: AttackDial

    @classmethod
    def of(cls, run: Run[RestoreReport]) -> "_Row":
        dial = run.report.dial
        if dial is None or dial.attack is None:
            raise ValueError(f"the restore of {run.finetune!r} asked nobody")
        return cls(run=run, dial=dial, attack=dial.attack)


def _added(look: Look) -> str:
    return DASH if look.false_refusals is None else points(100 * look.false_refusals.added)


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the reports of restores, see `collect`."""
    return collect(AskingRuns, _read, arguments, program="python -m tools.asking", about=__doc__)


def _read(folder: Path) -> RestoreReport:
    report = RestoreReport.model_validate_json((folder / REPORT_NAME).read_text(encoding="utf-8"))
    return report.model_copy(update={"layers": (), "others": (), "files": ()})


if __name__ == "__main__":
    sys.exit(main())
