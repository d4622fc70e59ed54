"""What the gate found, as a table."""

from collections.abc import Sequence

from deltaguard.reports.records.base import RateRow
from deltaguard.reports.table import Cell, Column, Table, rate
from deltaguard.reports.text import points
from deltaguard.service.steps.examine import CheckResult, Share


def gate_table(checks: Sequence[CheckResult], title: str = "") -> Table:
    """Tabulate the checks of a job: the three models side by side, a row a check.

    Args:
        checks: what was found, on the same requests for all three.
        title: of the table.

    Example:
        >>> gate_table([]).columns[1].title
        'aligned'
    """
    return Table.of(
        title,
        checks,
        (
            (Column("lower is better", "name"), lambda check: check.check.replace("_", " ")),
            ("aligned", lambda check: _rate(check.aligned, check.requests)),
            ("fine-tuned", lambda check: _rate(check.finetuned, check.requests)),
            ("restored", lambda check: _rate(check.restored, check.requests)),
            ("points added", lambda check: _added(check.added)),
            ("allowed", lambda check: Cell(f"{check.allowed:g}", check.allowed)),
            (Column("verdict", "name"), lambda check: "passed" if check.passed else "failed"),
        ),
        note="the same requests for all three models, with 95 % intervals",
    )


def _rate(found: Share, requests: int) -> Cell:
    counted = round(found.value * requests)
    return rate(RateRow(successes=counted, total=requests, value=found.value, low=found.low, high=found.high))


def _added(found: Share) -> Cell:
    return Cell(points(found.value), found.value, f"{points(found.low)} to {points(found.high)}")
