"""Charts as inline SVG: no script, no font or file from elsewhere, colours from the page they stand in."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import altair as alt
import vl_convert

from deltaguard.reports.layers import NO_BLOCK, Kind, kinds
from deltaguard.reports.records.base import RateRow
from deltaguard.reports.records.demo import ModelRow
from deltaguard.reports.records.restore import LayerRow
from deltaguard.reports.text import model_label, percent
from deltaguard.text import printable_lines, shortened

LayerMeasure = Literal["kept_energy", "kept_entries", "safety_cost"]

# A page sets these properties for light and dark; the second value serves where an SVG stands alone.
COLOURS: Mapping[str, str] = {
    "aligned": "var(--aligned, #0067a5)",
    "finetuned": "var(--finetuned, #c2470a)",
    "restored": "var(--restored, #0a7d5a)",
    "kept_energy": "var(--restored, #0a7d5a)",
    "kept_entries": "var(--restored, #0a7d5a)",
    "safety_cost": "var(--finetuned, #c2470a)",
}
INK = "currentColor"
"""Whatever the page writes in."""
_GRID = "var(--line, #d8dce2)"
_WIDTH = 310
_RATE_WIDTH = 190
_ROW_HEIGHT = 36
_FONT_SIZE = 12
_LONGEST = 1000
"""Characters of a name in a chart; no expression in one is as long."""


def layers_chart(layers: Sequence[LayerRow], measure: LayerMeasure) -> str | None:
    """One number of every restored matrix: a strip of bars for each kind of layer, a bar for each block.

    Args:
        layers: the rows of a report.
        measure: the number to draw; both are shares.

    Returns:
        An SVG element as text, None where no matrix in a numbered block has the number.
    """
    groups = kinds(layers)
    rows = [row for kind in groups for row in _bars(kind, lambda row: getattr(row, measure))]
    if not rows:
        return None
    blocks = sorted({block for kind in groups for block, _ in kind.layers if block != NO_BLOCK})
    top = 1.0 if measure != "safety_cost" else _round_up(max(row["value"] for row in rows))
    bars = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=COLOURS[measure])
        .encode(
            x=alt.X("block:O", title="block", axis=_block_axis(blocks), scale=_block_scale(blocks)),
            y=alt.Y(
                "value:Q", title=None, axis=_share_axis((0, top), extent=44), scale=alt.Scale(domain=[0, top])
            ),
        )
        .properties(width=_WIDTH, height=_ROW_HEIGHT)
    )
    drawn = {row["kind"] for row in rows}
    header = alt.Header(
        labelOrient="top",
        labelAnchor="start",
        labelPadding=4,
        labelFontSize=_FONT_SIZE,
        labelFontWeight="bold",
        labelColor=INK,
        labelLimit=_WIDTH,
    )
    labels = [kind.label for kind in groups if kind.label in drawn]
    return svg_of(bars.facet(row=alt.Row("kind:N", title=None, sort=labels, header=header), spacing=12))


def rates_chart(models: Sequence[ModelRow], rate: Callable[[ModelRow], RateRow]) -> str:
    """One rate of each model: a point on a line from 0 to 100 %, its 95 % interval, and the number.

    Args:
        models: the rows of a demo report, drawn in this order.
        rate: picks the rate.

    Returns:
        An SVG element as text.
    """
    names = [model_label(model.name) for model in models]
    rows = [_rate_row(model, rate(model)) for model in models]
    y = alt.Y(
        "name:N",
        title=None,
        sort=names,
        axis=alt.Axis(ticks=False, labelPadding=10, minExtent=76, **plain_axis()),
    )
    colour = alt.Color(
        "name:N", legend=None, scale=alt.Scale(domain=names, range=[COLOURS[model.name] for model in models])
    )
    scale = alt.Scale(domain=[0, 1], nice=False)
    base = alt.Chart(alt.Data(values=rows)).encode(y=y, color=colour)
    bounds = base.mark_rule(strokeWidth=3, opacity=0.45, strokeCap="round").encode(
        x=alt.X("low:Q", title=None, axis=_share_axis((0, 0.5, 1), extent=0), scale=scale), x2="high:Q"
    )
    point = base.mark_point(filled=True, size=90, opacity=1).encode(x=alt.X("value:Q", scale=scale))
    number = base.mark_text(align="right", fontSize=_FONT_SIZE + 1, fontWeight="bold").encode(
        x=alt.value(_RATE_WIDTH + 76), text="text:N"
    )
    return svg_of(alt.layer(bounds, point, number).properties(width=_RATE_WIDTH, height=alt.Step(30)))


def _bars(kind: Kind, value: Callable[[LayerRow], float | None]) -> list[dict[str, Any]]:
    """One bar a block; where a block has several matrices of a kind, their median."""
    by_block: defaultdict[int, list[float]] = defaultdict(list)
    for block, row in kind.layers:
        number = value(row)
        if block != NO_BLOCK and number is not None and math.isfinite(number):
            by_block[block].append(number)
    return [
        {"kind": kind.label, "block": block, "value": statistics.median(numbers)}
        for block, numbers in by_block.items()
    ]


def _rate_row(model: ModelRow, rate: RateRow) -> dict[str, Any]:
    return {
        "name": model_label(model.name),
        "low": rate.low,
        "high": rate.high,
        "value": rate.value,
        "text": percent(rate.value),
    }


def _block_scale(blocks: Sequence[int]) -> alt.Scale:
    return alt.Scale(domain=list(blocks), paddingInner=0.2, paddingOuter=0.1)


def _block_axis(blocks: Sequence[int]) -> alt.Axis:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if len(blocks) / step <= 9)
    shown = [block for block in blocks if block % step == 0]
    return alt.Axis(values=shown, labelAngle=0, ticks=False, **plain_axis())


def _share_axis(values: Sequence[float], *, extent: int) -> alt.Axis:
    label = "format(100 * datum.value, '.3~r') + ' %'"
    return alt.Axis(
        values=list(values), labelExpr=label, labelFlush=False, ticks=False, minExtent=extent, **plain_axis()
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... at or above a share, in its own decimal place."""
    if value <= 0:
        return 0.01
    place = 10.0 ** math.floor(math.log10(value))
    return next(place * step for step in (1, 2, 5, 10) if place * step >= value)


def plain_axis() -> dict[str, Any]:
    """What all axes share: no line of their own, the page's ink."""
    return {
        "domain": False,
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": _GRID,
        "labelFontSize": _FONT_SIZE,
        "titleFontSize": _FONT_SIZE,
        "titleFontWeight": "normal",
    }


def svg_of(chart: Any) -> str:
    """Draw an altair chart as an SVG element.

    Whoever shows it describes it, so the marks carry no descriptions of their own. Names are cut off, since
    long ones take minutes, and hold no control characters, which end the process that draws them.
    """
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    chart = chart.configure(aria=False, background="transparent", font="system-ui, sans-serif")
    drawn = _drawable(chart.configure_view(stroke=None).to_dict())
    svg: str = vl_convert.vegalite_to_svg(drawn, vl_version=version)
    return svg


def _drawable(part: Any) -> Any:
    """A part of a chart with texts that can be drawn."""
    if isinstance(part, str):
        return shortened(printable_lines(part), _LONGEST)
    if isinstance(part, list):
        return [_drawable(each) for each in cast("list[Any]", part)]
    if isinstance(part, dict):
        named = cast("dict[str, Any]", part)
        return {_drawable(name): _drawable(each) for name, each in named.items()}
    return part
