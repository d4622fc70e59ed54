"""`deltaguard diff`."""

from typing import Annotated

from cyclopts import Parameter
from rich.console import Group
from rich.table import Table

from deltaguard.cli.sink import Json, emit
from deltaguard.reports.records.diff import DiffReport

_SHOWN = 30
_MOST_KINDS = 200


def diff(
    aligned: str,
    finetuned: str,
    /,
    *,
    deep: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Show what differs between two checkpoints, by layer and kind, from headers, and besides weights.

    Args:
        aligned: The model before fine-tuning.
        finetuned: The model after it, or a PEFT LoRA adapter folder.
        deep: Read the weights and compare their values.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.restoration.diff import diff as compare

    report = compare(aligned, finetuned, deep=deep)
    emit(report, _draw(report), as_json=json)


def _draw(report: DiffReport) -> Group:
    kinds = Table(title=f"{report.aligned} → {report.finetuned}", title_justify="left")
    for column in ("kind", "tensors", "differing", "relative norm of Δ"):
        kinds.add_column(column, justify="left" if column == "kind" else "right", overflow="fold")
    for row in report.kinds[:_MOST_KINDS]:
        norm = "" if row.relative_norm is None else f"{row.relative_norm:.2e}"
        kinds.add_row(row.kind, str(row.tensors), str(row.differing), norm)
    listed = [row for row in report.tensors if row.difference != "values" or row.not_finite]
    lines = [_more(len(report.kinds) - _MOST_KINDS, "kinds")] if len(report.kinds) > _MOST_KINDS else []
    lines += [
        f"{row.name}: {row.difference} (aligned {row.aligned or '-'}, fine-tuned {row.finetuned or '-'})"
        + (f", {row.not_finite} entries NaN or infinite" if row.not_finite else "")
        for row in listed[:_SHOWN]
    ]
    if len(listed) > _SHOWN:
        lines.append(_more(len(listed) - _SHOWN, "tensors"))
    lines += report.settings
    if not report.deep:
        lines.append("Headers only; --deep compares values.")
    needed = ", with --config-from" if report.settings else ""
    lines.append(f"The pair can be restored{needed}." if report.compatible else "Not the same architecture.")
    return Group(kinds, *lines)


def _more(count: int, what: str) -> str:
    return f"and {count} more {what} (all with --json)"
