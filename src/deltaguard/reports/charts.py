"""Charts as inline SVG: no script, no font or file from elsewhere, colours from the page they stand in."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from deltaguard.errors import require_packages
from deltaguard.reports.layers import NO_BLOCK, LayerMeasure, kinds
from deltaguard.reports.palette import colour
from deltaguard.reports.records.restore import LayerRow
from deltaguard.reports.records.sweep import SweepReport
from deltaguard.text import printable_lines, shortened

require_packages("Drawing charts", "reports", "altair", "vl_convert")
import altair as alt  # noqa: E402
import vl_convert  # noqa: E402

INK = "currentColor"
"""Whatever the page writes in."""
_GRID = "var(--line, #d8dce2)"
_FONT_SIZE = 12
_LOOK: Mapping[str, Any] = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "labelFlush": False,
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": _GRID,
        "labelFontSize": _FONT_SIZE,
        "titleFontSize": _FONT_SIZE,
        "titleFontWeight": "normal",
    },
    "header": {
        "labelOrient": "top",
        "labelAnchor": "start",
        "labelPadding": 4,
        "labelFontSize": _FONT_SIZE,
        "labelFontWeight": "bold",
        "labelColor": INK,
    },
    "legend": {
        "orient": "bottom",
        "columns": 5,
        "columnPadding": 18,
        "rowPadding": 6,
        "symbolStrokeWidth": 0,
        "symbolSize": 80,
        "symbolOpacity": 1,
        "labelColor": INK,
        "labelFontSize": _FONT_SIZE,
        "labelLimit": 0,
    },
    "title": {"anchor": "start", "color": INK, "subtitleColor": INK, "subtitleFontSize": _FONT_SIZE},
}
"""What all charts share: no lines of axes, the page's ink, names above strips, a legend below."""
_LAYERS_WIDTH = 310
_MARKS_WIDTH = 190
_SWEEP_WIDTH, _SWEEP_HEIGHT = 340, 240
_BEYOND = 10.0
"""By so much the curve of a sweep goes on to the left of the strictest limit."""
_APART = 32
"""Pixels between the names of two limits that are told."""
_CHOSEN, _MEASURED = 90, 36
"""Areas of a point that a limit allows, and of another."""
_LONGEST = 1000
"""Characters of a name in a chart; no expression in one is as long."""


@dataclass(frozen=True)
class Mark:
    """A number of one model in a chart.

    Attributes:
        name: of the model, as it is shown.
        strip: the part of the chart in which it stands, such as a judge's; empty where there is one.
        low: lower end of its interval.
        value: the number.
        high: upper end.
        text: the number in its unit.
    """

    name: str
    strip: str
    low: float
    value: float
    high: float
    text: str


def marks_chart(marks: Sequence[Mark], names: Sequence[str], *, shares: bool) -> str:
    """Draw one number of each model: a point, its 95 % interval, and the number; strips below one another.

    Args:
        marks: what is drawn.
        names: of all models, as they are shown; their place decides their colour.
        shares: whether the numbers are shares, so that the chart goes from 0 to 100 %.

    Returns:
        An SVG element as text, for a page that holds `palette_css`.
    """
    palette = alt.Scale(domain=list(names), range=[colour(place) for place in range(len(names))])
    y_axis = alt.Axis(labelPadding=10, minExtent=76, labelLimit=130)
    base = alt.Chart().encode(
        y=alt.Y("name:N", title=None, sort=list(names), axis=y_axis),
        color=alt.Color("name:N", legend=None, scale=palette),
    )
    if shares:
        axis, domain = share_axis(values=[0, 0.5, 1]), [0.0, 1.0]
    else:
        axis = alt.Axis(tickCount=4)
        low, high = min(mark.low for mark in marks), max(mark.high for mark in marks)
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        domain = [low - margin, high + margin]
    scale = alt.Scale(domain=domain, nice=False)
    bounds = base.mark_rule(strokeWidth=3, opacity=0.45, strokeCap="round")
    number = base.mark_text(align="right", fontSize=_FONT_SIZE + 1, fontWeight="bold")
    chart = alt.layer(
        bounds.encode(x=alt.X("low:Q", title=None, axis=axis, scale=scale), x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=alt.X("value:Q", scale=scale)),
        number.encode(x=alt.value(_MARKS_WIDTH + 76), text="text:N"),
        data=alt.Data(values=[asdict(mark) for mark in marks]),
    ).properties(width=_MARKS_WIDTH, height=alt.Step(30))
    strips = list(dict.fromkeys(mark.strip for mark in marks))
    return svg_of(chart if len(strips) < 2 else _strips(chart, "strip", strips, _MARKS_WIDTH))


def layers_chart(layers: Sequence[LayerRow], measure: LayerMeasure) -> str | None:
    """Draw one number of every restored matrix: a strip of bars for each kind of layer, a bar for each block.

    Args:
        layers: the rows of a report; where a block has several matrices of a kind, their median is drawn.
        measure: the number to draw; all are shares.

    Returns:
        An SVG element as text, None where no matrix in a numbered block has the number.
    """
    groups = kinds(layers)
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for kind in groups:
        for block, row in kind.layers:
            number: float | None = getattr(row, measure)
            if block != NO_BLOCK and number is not None and math.isfinite(number):
                found[kind.label, block].append(number)
    if not found:
        return None
    rows = [
        {"kind": kind, "block": block, "value": statistics.median(numbers)}
        for (kind, block), numbers in found.items()
    ]
    blocks = sorted({block for kind in groups for block, _ in kind.layers if block != NO_BLOCK})
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if len(blocks) / step <= 9)
    shown = [block for block in blocks if block % step == 0]
    cost = measure == "safety_cost"
    top = _round_up(max(map(statistics.median, found.values()))) if cost else 1.0
    x_axis = alt.Axis(values=shown, labelAngle=0)
    x_scale = alt.Scale(domain=blocks, paddingInner=0.2, paddingOuter=0.1)
    y_axis = share_axis(values=[0, top], minExtent=44)
    bars = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=colour(1 if cost else 2))
        .encode(
            x=alt.X("block:O", title="block", axis=x_axis, scale=x_scale),
            y=alt.Y("value:Q", title=None, axis=y_axis, scale=alt.Scale(domain=[0, top])),
        )
        .properties(width=_LAYERS_WIDTH, height=36)
    )
    drawn = {kind for kind, _ in found}
    labels = [kind.label for kind in groups if kind.label in drawn]
    return svg_of(_strips(bars, "kind", labels, _LAYERS_WIDTH))


def sweep_chart(report: SweepReport) -> str:
    """Draw the points of a sweep, the limits as upright lines, and the fine-tuned model as a square.

    Safety KL lies on a logarithmic scale. Points further left than it goes stand at its left edge: see
    `at_edge`.

    Returns:
        An SVG element as text, for a page that holds the colours of the models.
    """
    low, high = _sweep_domain(report)
    chosen = {budget.mu for budget in report.budgets}
    rows = [
        {
            "x": max(point.safety_kl, low),
            "y": report.kept_share(point),
            "place": place,
            "size": _CHOSEN if point.mu in chosen else _MEASURED,
        }
        for place, point in enumerate(report.points)
    ]
    heights = [row["y"] for row in rows]
    bottom, top = min(0.0, *heights), max(1.0, *heights)
    room = 0.12 * (top - bottom)
    kept = "share of the gain kept" if report.has_gain else "share of the delta's energy kept"
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "x:Q",
            title="safety KL, nats per response token",
            axis=_powers_axis(low, high),
            scale=alt.Scale(type="log", domain=[low, high], nice=False),
        ),
        y=alt.Y(
            "y:Q",
            title=kept,
            axis=share_axis(tickCount=5, minExtent=48, labelPadding=10),
            # A point can lose, or gain beyond the fine-tuned model.
            scale=alt.Scale(domain=[bottom - room / 3, top + room], nice=False),
        ),
    )
    layers = (
        *_limits(report, low, high),
        base.mark_line(color=colour(2), strokeWidth=1.75).encode(order="place:Q"),
        base.mark_point(filled=True, opacity=1, color=colour(2)).encode(size=alt.Size("size:Q", scale=None)),
        *_finetuned(report, low, high),
    )
    return svg_of(alt.layer(*layers).properties(width=_SWEEP_WIDTH, height=_SWEEP_HEIGHT))


def at_edge(report: SweepReport) -> int:
    """Count the points at the left edge: their safety KL is 0, below it by rounding, or tiny."""
    low, _ = _sweep_domain(report)
    return sum(point.safety_kl < low for point in report.points)


def _sweep_domain(report: SweepReport) -> tuple[float, float]:
    """From somewhat below the strictest limit, or the safest point above that, to what costs most."""
    limits = [budget.limit for budget in report.budgets]
    known = [*limits, *(point.safety_kl for point in report.points), report.finetuned_kl]
    least = min(limits) / _BEYOND
    return 0.7 * min(value for value in known if value >= least), 1.6 * max(known)


def _limits(report: SweepReport, low: float, high: float) -> tuple[Any, Any]:
    """Lines at the limits, and above the plot the names of those that are not too close to the one before."""
    limits = [budget.limit for budget in report.budgets]
    pixels = {limit: _SWEEP_WIDTH * math.log(limit / low) / math.log(high / low) for limit in limits}
    named: list[float] = []
    for limit in limits:
        if not named or pixels[limit] - pixels[named[-1]] >= _APART:
            named.append(limit)
    lines = alt.Chart(alt.Data(values=[{"x": limit} for limit in limits]))
    names = alt.Chart(alt.Data(values=[{"x": limit, "text": _power(limit)} for limit in named]))
    return (
        lines.mark_rule(color=INK, strokeDash=[3, 3], opacity=0.6).encode(x="x:Q"),
        names.mark_text(fontSize=11, color=INK).encode(x="x:Q", y=alt.value(-8), text="text:N"),
    )


def _finetuned(report: SweepReport, low: float, high: float) -> tuple[Any, Any]:
    """Find the fine-tuned model, with its name above it and towards the middle."""
    place = max(report.finetuned_kl, low)
    base = alt.Chart(alt.Data(values=[{"x": place, "y": 1.0, "text": "fine-tuned"}])).encode(x="x:Q", y="y:Q")
    right = place > math.sqrt(low * high)
    align, dx = ("right", 5) if right else ("left", -5)
    name = base.mark_text(align=align, dx=dx, dy=-13, fontSize=12, fontWeight="bold", color=colour(1))
    mark = base.mark_point(filled=True, shape="square", size=_CHOSEN, opacity=1, color=colour(1))
    return mark, name.encode(text="text:N")


def _powers_axis(low: float, high: float) -> Any:
    """Powers of ten; where fewer than two of them are in sight, their multiples, too."""
    places = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1,), (1, 3), (1, 2, 3, 5, 7)):
        ticks = [m * 10.0**place for place in places for m in multiples if low <= m * 10.0**place <= high]
        if len(ticks) >= 2:
            break
    return alt.Axis(values=ticks, labelExpr="format(datum.value, '.1~e')", grid=False)


def _power(limit: float) -> str:
    """Give a limit in up to three digits, with its power of ten.

    Example:
        >>> _power(3e-05), _power(0.00015)
        ('3e-5', '1.5e-4')
    """
    digits, power = f"{limit:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def share_axis(**options: Any) -> alt.Axis:
    """Make an axis of shares, in percent."""
    return alt.Axis(labelExpr="format(100 * datum.value, '.3~r') + ' %'", **options)


def svg_of(chart: Any) -> str:
    """Draw an altair chart as an SVG element.

    Whoever shows it describes it, so the marks carry no descriptions of their own. Names are cut off, since
    long ones take minutes, and hold no control characters, which end the process that draws them.
    """
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    drawn = _drawable(chart.configure(aria=False, background="transparent", **_LOOK).to_dict())
    svg: str = vl_convert.vegalite_to_svg(drawn, vl_version=version)
    return svg


def _strips(chart: Any, field: str, names: Sequence[str], width: int) -> Any:
    """Put one chart for each name below another, each under its name."""
    header = alt.Header(labelLimit=width)
    return chart.facet(row=alt.Row(f"{field}:N", title=None, sort=list(names), header=header), spacing=11)


def _round_up(value: float) -> float:
    """Find the next of 1, 2, 5, 10, ... at or above a share, in its own decimal place."""
    if value <= 0:
        return 0.01
    place = 10.0 ** math.floor(math.log10(value))
    return next(place * step for step in (1, 2, 5, 10) if place * step >= value)


def _drawable(part: Any) -> Any:
    """Give a part of a chart with texts that can be drawn."""
    if isinstance(part, str):
        return shortened(printable_lines(part), _LONGEST)
    if isinstance(part, list):
        return [_drawable(each) for each in cast("list[Any]", part)]
    if isinstance(part, dict):
        named = cast("dict[str, Any]", part)
        return {_drawable(name): _drawable(each) for name, each in named.items()}
    return part
