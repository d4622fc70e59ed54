"""The safety-utility plot of a bench: a panel a fine-tune, a line and a band a method, a point a strength."""

from collections.abc import Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any

import altair as alt

from deltaguard.errors import DeltaguardError
from deltaguard.reports.bench_rows import band_rows, cut, point_rows, utility_domain
from deltaguard.reports.bench_view import bench_methods, points_of
from deltaguard.reports.bench_words import panel_notes
from deltaguard.reports.charts import INK, plain_axis, svg_of
from deltaguard.reports.palette import colour, dash, palette_css, shape
from deltaguard.reports.records.bench import BenchReport, FinetuneRow

_WIDTH, _HEIGHT = 264, 220
_STANDALONE = "deltaguard-plot"
_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100)
# Attack success runs from -5 to 100 points, the bound lies at about 2: linear near 0, logarithmic beyond.
_BEND = 5
_SAFETY = "attack success over aligned, points"
_KEPT = "share of the utility gain kept"
_GENERAL = "rise of NLL on general questions"
_BAND = 0.12
"""Opacity of a band: nine on one another still let the lines be seen."""
_READING = "Up keeps more; right of the bound is unsafe. Numbers: strengths of the first method."
_INTERVALS = (
    "Bands, and upright bars of points alone: 95 % intervals of the height. Level bars: of attack success."
)
_LINE = 33
"""Characters of a title or note that a panel is wide."""


def bench_svg(report: BenchReport) -> str:
    """The whole plot as a stand-alone SVG file.

    It brings its own ground, in the reader's colour scheme, so it can be read on any page.

    Args:
        report: of a finished bench.

    Returns:
        The text of an SVG file, the legend included.

    Raises:
        DeltaguardError: the report holds no curve.

    Example:
        ```python
        Path("bench.svg").write_text(bench_svg(report), encoding="utf-8")
        ```
    """
    titled = [
        _panel(report, row, legend=True).properties(title=_title(row.title, panel_notes(report, row)))
        for row in report.finetunes
        if point_rows(report, row)
    ]
    if not titled:
        raise DeltaguardError(
            f"The report of `{report.command}` holds {len(report.curves)} points of curves and none can be "
            "drawn. Run the bench to its end."
        )
    chart = alt.concat(*titled, columns=2, spacing=28, title=_caption(report))
    chart = chart.resolve_scale(color="shared", shape="shared", strokeDash="shared", x="independent")
    return _standalone(svg_of(chart.properties(padding=16)), _spoken_whole(report))


def panel_svg(report: BenchReport, finetune: FinetuneRow) -> str | None:
    """The panel of one fine-tune without a legend, for a page that holds `palette_css`.

    Args:
        report: of a finished bench.
        finetune: one of its rows.

    Returns:
        An SVG element as text, None where there is nothing to draw.
    """
    return svg_of(_panel(report, finetune, legend=False)) if point_rows(report, finetune) else None


def swatch_svg(place: int) -> str:
    """A short line with a point, as a legend shows a method.

    Args:
        place: of the method among `bench_methods`.

    Returns:
        An SVG element as text.
    """
    x, y = alt.X("x:Q", axis=None), alt.value(8)
    base = alt.Chart(alt.Data(values=[{"x": 0}, {"x": 1}])).encode(x=x, y=y)
    line = base.mark_line(color=colour(place), strokeDash=dash(place), strokeWidth=2)
    # The value of an altair encoding counts in pixels.
    point = (
        alt.Chart(alt.Data(values=[{}]))
        .mark_point(shape=shape(place), filled=True, size=70, opacity=1, color=colour(place))
        .encode(x=alt.value(18), y=y)
    )
    return svg_of(alt.layer(line, point).properties(width=36, height=16, padding=1))


def _panel(report: BenchReport, finetune: FinetuneRow, *, legend: bool) -> Any:
    found, gains = point_rows(report, finetune), finetune.gains
    domain = utility_domain(found, gains=gains)
    # Said in the data: an expression with a name in it is a program, and names come from files.
    named = bench_methods(report)[0]
    rows = [cut(row, domain) | {"named_here": row["method"] == named} for row in found]
    styles = _styles(bench_methods(report), legend=legend)
    scale, axis = _utility_scale(domain, gains=gains), _utility_axis(gains=gains)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("x:Q", title=_SAFETY, scale=_safety_scale(rows, report.bound), axis=_safety_axis()),
        y=alt.Y("y:Q", title=_KEPT if gains else _GENERAL, scale=scale, axis=axis),
        color=styles["color"],
    )
    bands = alt.Chart(alt.Data(values=list(band_rows(rows)))).encode(
        x="x:Q", y="y:Q", color=styles["color"], order="place:Q"
    )
    alone = base.transform_filter("datum.alone").mark_rule(opacity=0.5)
    first = base.transform_filter("datum.named_here")
    return alt.layer(
        bands.mark_line(filled=True, strokeWidth=0, fillOpacity=_BAND),
        *_bound(report.bound),
        base.mark_rule(opacity=0.35).encode(x="low:Q", x2="high:Q"),
        alone.encode(y="y_low:Q", y2="y_high:Q"),
        base.mark_line(strokeWidth=1.75).encode(order="strength:Q", strokeDash=styles["strokeDash"]),
        base.mark_point(filled=True, size=62, opacity=1).encode(shape=styles["shape"]),
        first.mark_text(align="left", baseline="top", dx=6, dy=3, fontSize=11).encode(text="named:N"),
    ).properties(width=_WIDTH, height=_HEIGHT)


def _styles(methods: Sequence[str], *, legend: bool) -> Mapping[str, Any]:
    """Colour, shape and dashes of each method, the same in every panel."""
    guide = _legend() if legend else None
    places = range(len(methods))
    named = alt.Scale(domain=list(methods), range=[colour(place) for place in places])
    shapes = alt.Scale(domain=list(methods), range=[shape(place) for place in places])
    dashes = alt.Scale(domain=list(methods), range=[dash(place) for place in places])
    return {
        "color": alt.Color("method:N", scale=named, legend=guide),
        "shape": alt.Shape("method:N", scale=shapes, legend=guide),
        "strokeDash": alt.StrokeDash("method:N", scale=dashes, legend=guide),
    }


def _bound(bound: float) -> tuple[Any, Any]:
    """A line at the bound, and its name."""
    base = alt.Chart(alt.Data(values=[{"x": bound, "text": f"bound {bound:g}"}])).encode(x="x:Q")
    name = base.mark_text(align="left", baseline="top", dx=4, fontSize=11, color=INK)
    return (
        base.mark_rule(color=INK, strokeDash=[3, 3], opacity=0.75),
        name.encode(y=alt.value(3), text="text:N"),
    )


def _safety_scale(rows: Sequence[Mapping[str, Any]], bound: float) -> alt.Scale:
    low = min(0.0, *(row["low"] for row in rows))
    high = max(2 * bound, *(row["high"] for row in rows))
    return alt.Scale(type="symlog", constant=_BEND, domain=[low - 0.5, high * 1.05], nice=False)


def _safety_axis() -> alt.Axis:
    plus = "format(datum.value, '+')"
    return alt.Axis(values=list(_TICKS), labelExpr=f"datum.value ? {plus} : '0'", ticks=False, **plain_axis())


def _utility_scale(domain: tuple[float, float], *, gains: bool) -> alt.Scale:
    """Up is better in every panel."""
    return alt.Scale(domain=list(domain), nice=False, reverse=not gains)


def _utility_axis(*, gains: bool) -> alt.Axis:
    share, rise = "format(100 * datum.value, '.3~r') + ' %'", "format(datum.value, '+.2~f')"
    label = share if gains else f"datum.value ? {rise} : '0'"
    return alt.Axis(labelExpr=label, tickCount=6, ticks=False, minExtent=44, **plain_axis())


def _title(text: str, notes: Sequence[str]) -> alt.TitleParams:
    small = [line for note in notes for line in wrap(note, _LINE)]
    return alt.TitleParams(
        wrap(text, _LINE),
        subtitle=small,
        anchor="start",
        frame="group",
        color=INK,
        subtitleColor=INK,
        fontSize=14,
        subtitleFontSize=12,
        offset=8,
    )


def _legend() -> alt.Legend:
    return alt.Legend(
        orient="bottom",
        title=None,
        columns=5,
        columnPadding=18,
        rowPadding=6,
        symbolStrokeWidth=0,
        labelColor=INK,
        labelFontSize=12,
        labelLimit=0,
        symbolSize=80,
        symbolOpacity=1,
    )


def _caption(report: BenchReport) -> alt.TitleParams:
    """Below the panels: what shows an interval, and which panels cannot be drawn."""
    missing = [row for row in report.finetunes if points_of(report, row) and not point_rows(report, row)]
    lines = [
        line
        for row in missing
        for line in wrap(f"{row.title}: {'; '.join(panel_notes(report, row))}", 3 * _LINE)
    ]
    return alt.TitleParams(
        [*wrap(f"{_READING} {_INTERVALS}", 3 * _LINE), *lines],
        orient="bottom",
        anchor="start",
        color=INK,
        fontSize=12,
        fontWeight="normal",
        offset=12,
    )


def _spoken_whole(report: BenchReport) -> str:
    names = ", ".join(row.title for row in report.finetunes)
    methods = ", ".join(bench_methods(report))
    told = f"Attack success against utility on {names}. Methods: {methods}."
    return f"{told} The bound is {report.bound:g} points."


def _standalone(svg: str, spoken: str) -> str:
    """Give an SVG element what a page would: colours, ink, a ground and words."""
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
