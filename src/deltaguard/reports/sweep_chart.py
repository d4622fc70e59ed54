"""The curve of a sweep: measured safety KL against what is kept."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from deltaguard.reports.charts import COLOURS, INK, plain_axis, svg_of
from deltaguard.reports.records.sweep import SweepReport
from deltaguard.reports.sweep_table import has_gain, kept_share

_WIDTH, _HEIGHT = 340, 240
_BEYOND = 10.0
"""By so much the curve goes on to the left of the strictest limit."""
_APART = 32
"""Pixels between the names of two limits that are told."""
_SAFETY = "safety KL, nats per response token"
_CHOSEN, _MEASURED = 90, 36
"""Areas of a point that a limit allows, and of another."""


def sweep_chart(report: SweepReport) -> str:
    """The points of a sweep, the limits as upright lines, and the whole fine-tuned model beside them.

    Safety KL lies on a logarithmic scale. Points further left than it goes stand at its left edge: see
    `at_edge`.

    Args:
        report: of a finished sweep.

    Returns:
        An SVG element as text, for a page that holds the colours of the models.
    """
    low, high = _domain(report)
    rows, heights = _rows(report, low), [kept_share(report, point) for point in report.points]
    kept = "share of the gain kept" if has_gain(report) else "share of the delta's energy kept"
    x = alt.X(
        "x:Q",
        title=_SAFETY,
        axis=_safety_axis(low, high),
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
    )
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=x, y=alt.Y("y:Q", title=kept, axis=_share_axis(), scale=_share_scale(heights))
    )
    return svg_of(
        alt.layer(
            *_limits(report, low, high),
            base.mark_line(color=COLOURS["restored"], strokeWidth=1.75).encode(order="place:Q"),
            base.mark_point(filled=True, opacity=1, color=COLOURS["restored"]).encode(
                size=alt.Size("size:Q", scale=None)
            ),
            *_whole(report, low, high),
        ).properties(width=_WIDTH, height=_HEIGHT)
    )


def at_edge(report: SweepReport) -> int:
    """How many points stand at the left edge since their safety KL is 0, below it by rounding, or tiny."""
    low, _ = _domain(report)
    return sum(point.safety_kl < low for point in report.points)


def _domain(report: SweepReport) -> tuple[float, float]:
    """From somewhat below the strictest limit, or the safest point above that, to what costs most."""
    limits = [budget.limit for budget in report.budgets]
    known = [*limits, *(point.safety_kl for point in report.points), report.finetuned_kl]
    least = min(limits) / _BEYOND
    return 0.7 * min(value for value in known if value >= least), 1.6 * max(known)


def _rows(report: SweepReport, low: float) -> list[dict[str, Any]]:
    chosen = {budget.mu for budget in report.budgets}
    return [
        {
            "x": max(point.safety_kl, low),
            "y": kept_share(report, point),
            "place": place,
            "size": _CHOSEN if point.mu in chosen else _MEASURED,
        }
        for place, point in enumerate(report.points)
    ]


def _limits(report: SweepReport, low: float, high: float) -> tuple[Any, Any]:
    """Lines at the limits, and above the plot the names of those that are not too close to the one before."""
    limits = [budget.limit for budget in report.budgets]
    pixels = {limit: _WIDTH * math.log(limit / low) / math.log(high / low) for limit in limits}
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


def _whole(report: SweepReport, low: float, high: float) -> tuple[Any, Any]:
    """The fine-tuned model, with its name above it and towards the middle."""
    place, colour = max(report.finetuned_kl, low), COLOURS["finetuned"]
    row = {"x": place, "y": 1.0, "text": "fine-tuned"}
    base = alt.Chart(alt.Data(values=[row])).encode(x="x:Q", y="y:Q")
    right = place > math.sqrt(low * high)
    name = base.mark_text(
        align="right" if right else "left",
        dx=5 if right else -5,
        dy=-13,
        fontSize=12,
        fontWeight="bold",
        color=colour,
    )
    mark = base.mark_point(filled=True, shape="square", size=_CHOSEN, opacity=1, color=colour)
    return mark, name.encode(text="text:N")


def _safety_axis(low: float, high: float) -> alt.Axis:
    """Powers of ten; where fewer than two of them are in sight, their multiples, too."""
    places = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 3, 5, 7)):
        ticks = [m * 10.0**place for place in places for m in multiples if low <= m * 10.0**place <= high]
        if len(ticks) >= 2:
            break
    return alt.Axis(
        values=ticks,
        labelExpr="format(datum.value, '.1~e')",
        labelFlush=False,
        ticks=False,
        grid=False,
        **plain_axis(),
    )


def _share_axis() -> alt.Axis:
    label = "format(100 * datum.value, '.3~r') + ' %'"
    return alt.Axis(labelExpr=label, tickCount=5, ticks=False, minExtent=48, labelPadding=10, **plain_axis())


def _share_scale(heights: Sequence[float]) -> alt.Scale:
    """From nothing to all, and a little more: a point can lose, or gain beyond the fine-tuned model."""
    low, high = min(0.0, *heights), max(1.0, *heights)
    room = 0.12 * (high - low)
    return alt.Scale(domain=[low - room / 3, high + room], nice=False)


def _power(limit: float) -> str:
    """A limit in up to three digits, with its power of ten.

    Example:
        >>> _power(3e-05), _power(0.00015)
        ('3e-5', '1.5e-4')
    """
    digits, power = f"{limit:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
