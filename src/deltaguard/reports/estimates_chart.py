"""Estimates of several models as a chart: points with their intervals, judges below one another."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from deltaguard.reports.charts import INK, plain_axis, svg_of
from deltaguard.reports.evaluation_view import is_share, value_text
from deltaguard.reports.palette import colour
from deltaguard.reports.records.evaluation import Measure
from deltaguard.reports.text import model_label

_WIDTH = 190
_NUMBER_AT = _WIDTH + 76
_ROW = 30
_LABEL_LIMIT = 130


def estimates_chart(measures: Sequence[Measure], models: Sequence[str]) -> str:
    """One measure of each model: a point, its 95 % interval, and the number; a strip for each judge.

    Args:
        measures: of one name in one section.
        models: names of all models; their place decides their colour.

    Returns:
        An SVG element as text, for a page that holds `palette_css`.
    """
    rows = [_row(measure) for measure in measures]
    names = [model_label(model) for model in models]
    palette = alt.Scale(domain=names, range=[colour(place) for place in range(len(names))])
    y_axis = alt.Axis(ticks=False, labelPadding=10, minExtent=76, labelLimit=_LABEL_LIMIT, **plain_axis())
    base = alt.Chart().encode(
        y=alt.Y("name:N", title=None, sort=names, axis=y_axis),
        color=alt.Color("name:N", legend=None, scale=palette),
    )
    axis, scale = _axis(measures), alt.Scale(domain=_domain(measures), nice=False)
    bounds = base.mark_rule(strokeWidth=3, opacity=0.45, strokeCap="round")
    number = base.mark_text(align="right", fontSize=13, fontWeight="bold")
    chart = alt.layer(
        bounds.encode(x=alt.X("low:Q", title=None, axis=axis, scale=scale), x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=alt.X("value:Q", scale=scale)),
        number.encode(x=alt.value(_NUMBER_AT), text="text:N"),
        data=alt.Data(values=rows),
    ).properties(width=_WIDTH, height=alt.Step(_ROW))
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    return svg_of(chart if len(judges) < 2 else _strips(chart, judges))


def _strips(chart: Any, judges: Sequence[str]) -> Any:
    header = alt.Header(
        labelOrient="top",
        labelAnchor="start",
        labelPadding=4,
        labelFontSize=12,
        labelFontWeight="bold",
        labelColor=INK,
        labelLimit=_WIDTH,
    )
    return chart.facet(row=alt.Row("judge:N", title=None, sort=list(judges), header=header), spacing=10)


def _row(measure: Measure) -> dict[str, Any]:
    estimate = measure.estimate
    return {
        "name": model_label(measure.model),
        "judge": measure.judge or "",
        "low": estimate.low,
        "high": estimate.high,
        "value": estimate.value,
        "text": value_text(estimate),
    }


def _domain(measures: Sequence[Measure]) -> list[float]:
    """All of a share's range; else what the intervals span, and a little more."""
    if all(is_share(measure.estimate) for measure in measures):
        return [0.0, 1.0]
    low = min(measure.estimate.low for measure in measures)
    high = max(measure.estimate.high for measure in measures)
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - margin, high + margin]


def _axis(measures: Sequence[Measure]) -> alt.Axis:
    if all(is_share(measure.estimate) for measure in measures):
        label = "format(100 * datum.value, '.3~r') + ' %'"
        return alt.Axis(values=[0, 0.5, 1], labelExpr=label, labelFlush=False, ticks=False, **plain_axis())
    return alt.Axis(tickCount=4, labelFlush=False, ticks=False, **plain_axis())
