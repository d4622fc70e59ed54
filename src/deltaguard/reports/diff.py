"""What differs between two checkpoints as a terminal table."""

from rich.console import Group, RenderableType
from rich.text import Text

from deltaguard.reports.records.diff import NOT_COMPARED, DiffReport
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import DASH

_MOST_KINDS, _MOST_TENSORS = 200, 30


def diff_table(report: DiffReport) -> RenderableType:
    """Draw what differs between two checkpoints.

    Args:
        report: of `diff`.
    """
    table = Table.of(
        f"{report.aligned} → {report.finetuned}",
        report.kinds[:_MOST_KINDS],
        (
            (Column("kind", "name"), lambda row: row.kind),
            ("tensors", lambda row: row.tensors),
            ("differing", lambda row: DASH if row.differing is None else row.differing),
            (
                "relative\nnorm of Δ",
                lambda row: DASH if row.relative_norm is None else f"{row.relative_norm:.2e}",
            ),
        ),
    )
    listed = [row for row in report.tensors if row.difference != "values" or row.not_finite]
    lines: list[str] = []
    if len(report.kinds) > _MOST_KINDS:
        lines.append(f"and {len(report.kinds) - _MOST_KINDS} more kinds (all with --json)")
    lines += [
        f"{row.name}: {row.difference} (aligned {row.aligned or '-'}, fine-tuned {row.finetuned or '-'})"
        + (f", {row.not_finite} entries NaN or infinite" if row.not_finite else "")
        for row in listed[:_MOST_TENSORS]
    ]
    if len(listed) > _MOST_TENSORS:
        lines.append(f"and {len(listed) - _MOST_TENSORS} more tensors (all with --json)")
    lines += report.settings
    if not report.deep:
        lines.append(
            "Headers only, so a dash stands for weights that were not compared; --deep compares them."
        )
    if report.obstacle is not None:
        lines.append(f"The pair cannot be restored: {report.obstacle}")
    else:
        unknown = any(each.startswith(NOT_COMPARED) for each in report.settings)
        how = ", with --config-from aligned" if unknown else ", with --config-from" if report.settings else ""
        lines.append(f"The pair can be restored{how}.")
    return Group(table.terminal(), *map(Text, lines))
