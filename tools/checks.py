"""What checks found and took, as one small file: `python -m tools.checks NAME=FILE ... -o FILE`.

Each file is what `deltaguard check --json` printed. `checks_table` draws a table of the documentation.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from deltaguard.reports.records.check import CheckReport
from deltaguard.reports.records.dial import Compared
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import DASH, duration, nats, percent, points
from tools.runs import Runs, collect
from tools.tables import made_with, small

Checks = Runs[CheckReport]
"""`docs/results/checks.json`."""


def checks_table(content: str) -> str:
    """Draw what each check found, of how many requests, and how long that took.

    Args:
        content: a `Checks` as JSON.

    Returns:
        Markdown.
    """
    runs = Checks.model_validate_json(content).runs
    drawn = Table.of(
        "",
        runs,
        (
            (Column("fine-tune", "words"), lambda run: run.finetune),
            (Column("verdict", "name"), lambda run: run.report.verdict),
            ("attack success", lambda run: rates(run.report.look.attack_success)),
            ("false refusals", lambda run: rates(run.report.look.false_refusals)),
            ("safety KL", lambda run: nats(run.report.safety_kl.safety_kl)),
            ("time", lambda run: DASH if run.report.seconds is None else duration(run.report.seconds)),
        ),
    ).markdown()
    return f"{drawn}\n\n{small(made_with(*(run.report.environment for run in runs)))}"


def rates(found: Compared | None) -> str:
    """Say how often a model answered so, and the aligned one; a dash where it was not asked."""
    if found is None:
        return DASH
    candidate, aligned = (percent(count / found.prompts) for count in (found.candidate, found.aligned))
    return f"{candidate}, aligned {aligned} of {found.prompts} ({points(100 * found.added)} points)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the reports of checks, see `collect`."""
    return collect(Checks, _read, arguments, program="python -m tools.checks", about=__doc__)


def _read(file: Path) -> CheckReport:
    return CheckReport.model_validate_json(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
