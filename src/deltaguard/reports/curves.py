"""The curves of a bench: a panel a fine-tune, a line and a band a method, a point a strength."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from textwrap import wrap
from typing import Any

from deltaguard.errors import DeltaguardError
from deltaguard.reports.charts import INK, alt, share_axis, svg_of
from deltaguard.reports.palette import colour, dash, palette_css, shape
from deltaguard.reports.records.bench import BenchReport, CurvePoint, FinetuneRow
from deltaguard.reports.records.evaluation import Estimate

_WIDTH, _HEIGHT = 264, 220
_STANDALONE = "deltaguard-plot"
_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100)
# Attack success runs from -5 to 100 points, the bound lies at about 2: linear near 0, logarithmic beyond.
_BEND = 5
_SIGNED = "datum.value ? format(datum.value, '{}') : '0'"
_BAND = 0.12
"""Opacity of a band: nine on one another still let the lines be seen."""
_READING = (
    "Up is better; right of the bound is unsafe. Numbers, where there is room: strengths of the first method."
)
_INTERVALS = (
    "Bands, and upright bars of points alone: 95 % intervals of the height. Level bars: of attack success."
)
_LINE = 33
"""Characters of a title or note that a panel is wide."""
_LETTER = 6.2
"""Pixels of a digit in a label."""


def bench_svg(report: BenchReport) -> str:
    """Draw a bench as a stand-alone SVG file: a panel a fine-tune, a line and a band a method.

    It brings its own ground, in the reader's colour scheme, so it can be read on any page.

    Returns:
        The text of an SVG file, the legend included.

    Raises:
        DeltaguardError: the report holds no curve.
    """
    titled = [
        _panel(report, row, legend=True).properties(
            title=alt.TitleParams(
                wrap(row.title, _LINE),
                subtitle=[line for note in panel_notes(report, row) for line in wrap(note, _LINE)],
                frame="group",
                fontSize=14,
                offset=8,
            )
        )
        for row in report.finetunes
        if point_rows(report, row)
    ]
    if not titled:
        raise DeltaguardError(
            f"The report of `{report.command}` holds {len(report.curves)} points of curves and none can be "
            "drawn. Run the bench to its end."
        )
    missing = [row for row in report.finetunes if report.points_of(row) and not point_rows(report, row)]
    said = [f"{_READING} {_INTERVALS}"]
    said += [f"{row.title}: {'; '.join(panel_notes(report, row))}" for row in missing]
    caption = alt.TitleParams(
        [line for text in said for line in wrap(text, 3 * _LINE)],
        orient="bottom",
        fontSize=12,
        fontWeight="normal",
        offset=12,
    )
    chart = alt.concat(*titled, columns=2, spacing=28, title=caption)
    chart = chart.resolve_scale(color="shared", shape="shared", strokeDash="shared", x="independent")
    return _standalone(svg_of(chart.properties(padding=16)), report)


def panel_svg(report: BenchReport, finetune: FinetuneRow) -> str | None:
    """Draw the panel of one fine-tune without a legend, for a page that holds `palette_css`.

    Returns:
        An SVG element as text, None where there is nothing to draw.
    """
    return svg_of(_panel(report, finetune, legend=False)) if point_rows(report, finetune) else None


def swatch_svg(place: int) -> str:
    """Draw a short line with a point, as a legend shows a method.

    Args:
        place: of the method among those of the report.
    """
    line = alt.Chart(alt.Data(values=[{"x": 0}, {"x": 1}])).encode(x=alt.X("x:Q", axis=None), y=alt.value(8))
    # The value of an altair encoding counts in pixels.
    point = alt.Chart(alt.Data(values=[{}])).encode(x=alt.value(18), y=alt.value(8))
    return svg_of(
        alt.layer(
            line.mark_line(color=colour(place), strokeDash=dash(place), strokeWidth=2),
            point.mark_point(shape=shape(place), filled=True, size=70, opacity=1, color=colour(place)),
        ).properties(width=36, height=16, padding=1)
    )


def panel_notes(report: BenchReport, finetune: FinetuneRow) -> tuple[str, ...]:
    """Say what a panel does not show, a line each."""
    found = report.points_of(finetune)
    missing = sum(_height(finetune, point) is None for point in found)
    total = len(found)
    return (f"not drawn, without a bounded share of gain: {missing} of {total} points",) if missing else ()


def point_rows(report: BenchReport, finetune: FinetuneRow) -> list[dict[str, Any]]:
    """Find the points of a panel that have a height.

    Returns:
        A row a point: `x`, `y` and the ends of their intervals; `alone` where its method has no other, so
        that no band can show its interval.
    """
    drawn = [
        (point, height)
        for point in report.points_of(finetune)
        if (height := _height(finetune, point)) is not None
    ]
    methods = [point.method for point, _ in drawn]
    return [
        {
            "method": point.method,
            "strength": point.strength,
            "x": point.points.value,
            "low": point.points.low,
            "high": point.points.high,
            "y": height.value,
            "y_low": height.low,
            "y_high": height.high,
            "alone": methods.count(point.method) == 1,
        }
        for point, height in drawn
    ]


def band_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Find the corners of each method's band: along the lower ends by strength, back along the upper.

    An area mark would order them by `x`, and a curve may turn back.

    Args:
        rows: of `point_rows`, cut to the panel.

    Returns:
        A row a corner, in the order in which `place` counts them; none for a point alone.
    """
    for method in dict.fromkeys(row["method"] for row in rows if not row["alone"]):
        curve = sorted((row for row in rows if row["method"] == method), key=lambda row: row["strength"])
        ends = [(row["x"], row["y_low"]) for row in curve]
        ends += [(row["x"], row["y_high"]) for row in reversed(curve)]
        for place, (x, y) in enumerate(ends):
            yield {"method": method, "x": x, "y": y, "place": place}


def utility_domain(rows: Sequence[Mapping[str, Any]], *, gains: bool) -> tuple[float, float]:
    """Find the range of heights that a panel shows: every point is inside, intervals may reach beyond."""
    values = [float(row["y"]) for row in rows]
    low, high = min(0.0, *values), max(1.0 if gains else 0.0, *values)
    margin = 0.08 * ((high - low) or 1.0)
    return low - margin, high + margin


def cut(row: Mapping[str, Any], domain: tuple[float, float]) -> dict[str, Any]:
    """End a point's interval where the panel does: a clip path would need an id of its own."""
    return {**row, "y_low": max(row["y_low"], domain[0]), "y_high": min(row["y_high"], domain[1])}


def label_rows(
    points: Sequence[tuple[float, float]],
    labels: Sequence[tuple[float, float, str]],
    along: Sequence[tuple[float, float]] = (),
) -> list[dict[str, Any]]:
    """Place labels next to their points where they cover no point and no other label.

    Args:
        points: all points of a panel, in pixels from its upper left corner.
        labels: place and text of each; it is left out where there is no room.
        along: places on lines and other texts, which a label covers only where there is no other room.

    Returns:
        A row a label: the pixels of its left end and middle, and its text.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    lines = [(x - 1, y - 1, x + 1, y + 1) for x, y in along]
    found: list[dict[str, Any]] = []
    for x, y, text in labels:
        width = _LETTER * len(text)
        right, left, middle = 7, -7 - width, -width / 2
        places = ((right, 9), (right, -9), (left, -9), (left, 9), (middle, -13), (middle, 13))
        boxes = [(x + dx, y + dy - 6, x + dx + width, y + dy + 6) for dx, dy in places]
        inside = [b for b in boxes if b[0] >= 0 and b[2] <= _WIDTH and b[1] >= 0 and b[3] <= _HEIGHT]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        clear = [box for box in free if not any(_overlap(box, other) for other in lines)]
        for box in (clear or free)[:1]:
            taken.append(box)
            found.append({"left": box[0], "middle": (box[1] + box[3]) / 2, "text": text})
    return found


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _height(finetune: FinetuneRow, point: CurvePoint) -> Estimate | None:
    """Where a point stands: the share of the gain kept, else how far general log-likelihood moved."""
    if finetune.gains:
        return point.kept
    rise = point.general
    return rise.model_copy(update={"value": -rise.value, "low": -rise.high, "high": -rise.low})


def _panel(report: BenchReport, finetune: FinetuneRow, *, legend: bool) -> Any:
    found, gains = point_rows(report, finetune), finetune.gains
    domain = utility_domain(found, gains=gains)
    rows = [cut(row, domain) for row in found]
    left, right = min(0.0, *(r["low"] for r in rows)), max(2 * report.bound, *(r["high"] for r in rows))
    edges = (left - 0.5, right * 1.05)
    guide = alt.Legend(title=None) if legend else None
    places = range(len(report.methods))
    ticks: Mapping[str, Any] = {"tickCount": 6, "minExtent": 44}

    def styled(values: Sequence[Any]) -> Mapping[str, Any]:
        """Give each method the same look in every panel."""
        return {"scale": alt.Scale(domain=list(report.methods), range=list(values)), "legend": guide}

    colours = alt.Color("method:N", **styled([colour(place) for place in places]))
    shapes = alt.Shape("method:N", **styled([shape(place) for place in places]))
    dashes = alt.StrokeDash("method:N", **styled([dash(place) for place in places]))
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "x:Q",
            title="attack success over aligned, points",
            scale=alt.Scale(type="symlog", constant=_BEND, domain=list(edges), nice=False),
            axis=alt.Axis(values=list(_TICKS), labelExpr=_SIGNED.format("+")),
        ),
        y=alt.Y(
            "y:Q",
            title="share of the utility gain kept" if gains else "log-likelihood, general, over aligned",
            scale=alt.Scale(domain=list(domain), nice=False),
            axis=share_axis(**ticks) if gains else alt.Axis(labelExpr=_SIGNED.format("+.2~f"), **ticks),
        ),
        color=colours,
    )
    bands = alt.Chart(alt.Data(values=list(band_rows(rows)))).encode(
        x="x:Q", y="y:Q", color=colours, order="place:Q"
    )
    alone = base.transform_filter("datum.alone").mark_rule(opacity=0.5)
    bound = alt.Chart(alt.Data(values=[{"x": report.bound, "text": f"bound {report.bound:g}"}])).encode(
        x="x:Q"
    )
    labels = alt.Chart(alt.Data(values=_strengths(report, rows, edges, domain)))
    return alt.layer(
        bands.mark_line(filled=True, strokeWidth=0, fillOpacity=_BAND),
        bound.mark_rule(color=INK, strokeDash=[3, 3], opacity=0.75),
        bound.mark_text(align="left", baseline="top", dx=4, fontSize=11, color=INK).encode(
            y=alt.value(3), text="text:N"
        ),
        base.mark_rule(opacity=0.35).encode(x="low:Q", x2="high:Q"),
        alone.encode(y="y_low:Q", y2="y_high:Q"),
        base.mark_line(strokeWidth=1.75).encode(order="strength:Q", strokeDash=dashes),
        base.mark_point(filled=True, size=62, opacity=1).encode(shape=shapes),
        labels.mark_text(align="left", baseline="middle", fontSize=11, color=colour(0)).encode(
            x=alt.X("left:Q", scale=None), y=alt.Y("middle:Q", scale=None), text="text:N"
        ),
    ).properties(width=_WIDTH, height=_HEIGHT)


def _strengths(
    report: BenchReport,
    rows: Sequence[Mapping[str, Any]],
    edges: tuple[float, float],
    domain: tuple[float, float],
) -> list[dict[str, Any]]:
    """Label the first method's strengths, clear of the bound, its name, and the lines between points.

    Placed here and not by an expression: one with a name in it is a program, and names come from files.
    """
    pixels = [(_WIDTH * _along(row["x"], edges), _HEIGHT * (1 - _linear(row["y"], domain))) for row in rows]
    named = [
        (*place, f"{row['strength']:g}")
        for place, row in zip(pixels, rows, strict=True)
        if row["method"] == report.methods[0]
    ]
    at_bound = _WIDTH * _along(report.bound, edges)
    occupied = [(at_bound, float(y)) for y in range(0, _HEIGHT, 4)]
    occupied += [(at_bound + x, 9.0) for x in range(4, 52, 4)]
    for method in dict.fromkeys(row["method"] for row in rows):
        curve = [
            (row["strength"], at) for row, at in zip(rows, pixels, strict=True) if row["method"] == method
        ]
        for (_, one), (_, other) in pairwise(sorted(curve)):
            steps = max(1, int(math.dist(one, other) / 4))
            shares = (step / steps for step in range(steps))
            occupied += [(one[0] + s * (other[0] - one[0]), one[1] + s * (other[1] - one[1])) for s in shares]
    return label_rows(pixels, named, occupied)


def _along(value: float, edges: tuple[float, float]) -> float:
    """Where a value lies on the scale of attack success, 0 being its left end and 1 its right one."""
    bent = [math.copysign(math.log1p(abs(each) / _BEND), each) for each in (value, *edges)]
    return _linear(bent[0], (bent[1], bent[2]))


def _linear(value: float, ends: tuple[float, float]) -> float:
    return (value - ends[0]) / (ends[1] - ends[0])


def _standalone(svg: str, report: BenchReport) -> str:
    """Give an SVG element what a page would: colours, ink, a ground and words."""
    names, methods = ", ".join(row.title for row in report.finetunes), ", ".join(report.methods)
    spoken = f"Attack success against utility on {names}. Methods: {methods}. "
    spoken += f"The bound is {report.bound:g} points."
    own = f"svg.{_STANDALONE}"
    style = (
        f"{own} {{ color: #1b1f26; --line: #d9dde3; --ground: #ffffff; max-width: 100%; height: auto; }}\n"
        f"@media (prefers-color-scheme: dark) "
        f"{{ {own} {{ color: #e8eaee; --line: #363c46; --ground: #1d2127; }} }}\n"
        f"{palette_css(own)}"
    )
    start, rest = svg.split(">", 1)
    start = start.replace('class="marks"', f'class="{_STANDALONE}" role="img"')
    ground = '<rect width="100%" height="100%" rx="8" style="fill: var(--ground)"/>'
    told = f"<title>Safety against utility</title><desc>{escape(spoken)}</desc>"
    return f"{start}>{told}<style>{style}</style>{ground}{rest}\n"
