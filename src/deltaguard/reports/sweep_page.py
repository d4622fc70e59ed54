"""A sweep as an HTML page."""

from dataclasses import dataclass

from deltaguard.reports.facts import environment_facts, model_facts, sweep_facts
from deltaguard.reports.page import Chart, render
from deltaguard.reports.records.sweep import SweepPoint, SweepReport
from deltaguard.reports.sweep_chart import at_edge, sweep_chart
from deltaguard.reports.sweep_table import (
    allowed,
    has_gain,
    limit_text,
    nll_text,
    price_text,
    sweep_line,
    sweep_notes,
)
from deltaguard.reports.text import DASH, nats, percent, sort_value


@dataclass(frozen=True)
class Cell:
    """A text in a table, and the number that it sorts by."""

    text: str
    value: str


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is of, and its numbers."""

    head: Cell
    cells: tuple[Cell, ...]
    model: str = ""


def sweep_page(report: SweepReport) -> str:
    """What each limit allows: the curve, a table by limit, and every point that was measured.

    Args:
        report: of a finished sweep.

    Returns:
        A complete HTML document.

    Example:
        ```python
        Path("report.html").write_text(sweep_page(report), encoding="utf-8")
        ```
    """
    return render(
        "sweep.html.jinja",
        report=report,
        line=sweep_line(report),
        notes=sweep_notes(report),
        chart=_chart(report),
        limits=_limits(report),
        points=_points(report),
        likely=report.aligned_nll is not None,
        run=(*model_facts(report), *sweep_facts(report), *environment_facts(report.environment)),
    )


def _chart(report: SweepReport) -> Chart:
    of = "gain" if has_gain(report) else "delta"
    note = (
        f"A point is a measured price; the large ones keep most of the {of} within a limit. "
        "Dashed: the limits. Further left is safer, further up keeps more."
    )
    edge = at_edge(report)
    if edge:
        some = "1 point stands" if edge == 1 else f"{edge} points stand"
        note += (
            f"\n{some} at the left edge: the safety KL is less than the scale shows, or 0 but for rounding."
        )
    return Chart(f"Share of the {of} kept, by safety KL", note, sweep_chart(report), sweep_line(report))


def _limits(report: SweepReport) -> list[Row]:
    likely = report.aligned_nll is not None
    rows: list[Row] = []
    for row in allowed(report):
        told = (Cell(nll_text(row.nll), sort_value(row.nll)), _share(row.gain)) if likely else ()
        cells = (Cell(nats(row.safety_kl), sort_value(row.safety_kl)), _share(row.kept), *told)
        model = row.name.replace("-", "") if row.limit is None else ""
        price = Cell(row.price, "")
        rows.append(Row(Cell(row.name, sort_value(row.limit)), (*cells, price), model))
    return rows


def _points(report: SweepReport) -> list[Row]:
    return [_point(report, point) for point in report.points]


def _point(report: SweepReport, point: SweepPoint) -> Row:
    best = [limit_text(budget.limit) for budget in report.budgets if budget.mu == point.mu]
    told = (Cell(nll_text(point.utility_nll), sort_value(point.utility_nll)), _share(report.kept_gain(point)))
    cells = (
        Cell(nats(point.safety_kl), sort_value(point.safety_kl)),
        Cell(nats(point.predicted_safety_kl), sort_value(point.predicted_safety_kl)),
        _share(point.kept_energy),
        *(told if report.aligned_nll is not None else ()),
        Cell(", ".join(best) or DASH, ""),
    )
    return Row(Cell(price_text(point.mu), sort_value(point.mu)), cells)


def _share(value: float | None) -> Cell:
    return Cell(percent(value), sort_value(value))
