"""The points and bands of a bench's plot as rows of data, before they are drawn."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltaguard.reports.bench_view import height, points_of
from deltaguard.reports.records.bench import BenchReport, CurvePoint, FinetuneRow
from deltaguard.reports.records.evaluation import Estimate


def point_rows(report: BenchReport, finetune: FinetuneRow) -> list[dict[str, Any]]:
    """The points of a panel that have a height.

    Args:
        report: of a finished bench.
        finetune: one of its rows.

    Returns:
        A row a point: `x`, `y` and the ends of their intervals; `alone` where its method has no other, so
        that no band can show its interval.
    """
    drawn = [
        (point, found)
        for point in points_of(report, finetune)
        if (found := height(finetune, point)) is not None
    ]
    methods = [point.method for point, _ in drawn]
    return [_row(point, found) | {"alone": methods.count(point.method) == 1} for point, found in drawn]


def band_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The corners of each method's band: along the lower ends in order of strength, back along the upper.

    An area mark would order them by `x`, and a curve may turn back.

    Args:
        rows: of `point_rows`, cut to the panel.

    Returns:
        A row a corner, in the order in which `place` counts them; none for a point alone.
    """
    for method in dict.fromkeys(row["method"] for row in rows if not row["alone"]):
        of_method = [row for row in rows if row["method"] == method]
        curve = sorted(of_method, key=lambda row: row["strength"])
        ends = [(row["x"], row["y_low"]) for row in curve]
        ends += [(row["x"], row["y_high"]) for row in reversed(curve)]
        for place, (x, y) in enumerate(ends):
            yield {"method": method, "x": x, "y": y, "place": place}


def utility_domain(rows: Sequence[Mapping[str, Any]], *, gains: bool) -> tuple[float, float]:
    """The range of heights that a panel shows: every point is inside, intervals may reach beyond."""
    values = [float(row["y"]) for row in rows]
    low, high = min(0.0, *values), max(1.0 if gains else 0.0, *values)
    margin = 0.08 * ((high - low) or 1.0)
    return low - margin, high + margin


def cut(row: Mapping[str, Any], domain: tuple[float, float]) -> dict[str, Any]:
    """A point whose interval ends where the panel does: a clip path would need an id of its own."""
    return {**row, "y_low": max(row["y_low"], domain[0]), "y_high": min(row["y_high"], domain[1])}


def _row(point: CurvePoint, found: Estimate) -> dict[str, Any]:
    return {
        "method": point.method,
        "strength": point.strength,
        "named": f"{point.strength:g}",
        "x": point.points.value,
        "low": point.points.low,
        "high": point.points.high,
        "y": found.value,
        "y_low": found.low,
        "y_high": found.high,
    }
