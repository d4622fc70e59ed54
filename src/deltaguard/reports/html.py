"""A demo and a restore as HTML pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaguard.reports.charts import LayerMeasure, layers_chart, rates_chart
from deltaguard.reports.facts import (
    Facts,
    environment_facts,
    model_facts,
    option_facts,
    outcome_facts,
    times,
)
from deltaguard.reports.layers import NO_BLOCK, Kind, kinds, other_groups, spread
from deltaguard.reports.page import Chart, render
from deltaguard.reports.records.base import RateRow
from deltaguard.reports.records.demo import DemoReport, ModelRow
from deltaguard.reports.records.restore import LayerRow, RestoreReport
from deltaguard.reports.text import interval, model_label, percent, size

RATES = (
    ("attack_success", "Attack success", "harmful prompts answered\nlower is better"),
    ("false_refusal", "False refusals", "harmless prompts refused\nlower is better"),
    ("task_accuracy", "Task accuracy", "task answers that match exactly\nhigher is better"),
)
"""The rates of a demo: field, title, and of what it is the share."""

LAYER_MEASURES: tuple[tuple[LayerMeasure, str, str], ...] = (
    ("kept_energy", "Energy kept", "share of the delta's energy that is left, by block"),
    ("kept_entries", "Entries kept", "share of the delta's entries at the fine-tuned value, by block"),
    ("safety_cost", "Safety cost", "share of the fine-tuned model's cost, by block; lower is safer"),
)
"""What is drawn of every layer, likewise."""


@dataclass(frozen=True)
class Grid:
    """The numbers behind a chart of layers: a row a block, a column a kind.

    Attributes:
        caption: what the numbers are.
        columns: labels of the kinds.
        rows: the block and one number a column, None where there is none.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[float | None, ...]], ...]


def demo_page(report: DemoReport) -> str:
    """The demo's story: three models measured alike, sample answers, and the restore between them.

    Args:
        report: of a finished demo.

    Returns:
        A complete HTML document.
    """
    run: Facts = (
        *environment_facts(report.environment),
        ("seed", str(report.seed)),
        ("time by stage", times(report.seconds)),
        ("peak memory", size(report.peak_memory_bytes)),
        *model_facts(report.restore),
    )
    return render(
        "demo.html.jinja",
        report=report,
        rates=[_rate_chart(report.models, *rate) for rate in RATES],
        run=run,
        **_restore_parts(report.restore),
    )


def restore_page(report: RestoreReport) -> str:
    """What one restore did: the choices, the numbers by layer, the other tensors, the files.

    Args:
        report: of a finished restore.

    Returns:
        A complete HTML document.
    """
    return render(
        "restore.html.jinja",
        report=report,
        run=environment_facts(report.environment),
        sources=model_facts(report),
        **_restore_parts(report),
    )


def _restore_parts(report: RestoreReport) -> Mapping[str, Any]:
    """What both pages show of a restore."""
    drawn = [_layer_chart(report.layers, *measure) for measure in LAYER_MEASURES]
    return {
        "restore": report,
        "options": option_facts(report.options),
        "outcome": outcome_facts(report),
        "kinds": kinds(report.layers),
        "others": other_groups(report.others),
        "drawn": [pair for pair in drawn if pair],
    }


def _rate_chart(models: Sequence[ModelRow], field: str, title: str, note: str) -> Chart:
    def rate(model: ModelRow) -> RateRow:
        return getattr(model, field)

    spoken = "; ".join(
        f"{model_label(model.name)} {percent(rate(model).value)}, interval {interval(rate(model))}"
        for model in models
    )
    return Chart(title, note, rates_chart(models, rate), f"{title}: {spoken}.")


def _layer_chart(
    layers: Sequence[LayerRow], measure: LayerMeasure, title: str, note: str
) -> tuple[Chart, Grid] | None:
    """A chart of layers and the numbers behind it; None where there are no numbers."""
    svg = layers_chart(layers, measure)
    if svg is None:
        return None
    groups = kinds(layers)
    medians: list[str] = []
    for kind in groups:
        numbers = spread(getattr(row, measure) for _, row in kind.layers)
        if numbers:
            span = f"{percent(numbers.low)} to {percent(numbers.high)}"
            medians.append(f"{kind.label} {percent(numbers.median)} ({span})")
    spoken = f"{title} by block. Median and range by kind: {'; '.join(medians)}."
    return Chart(title, note, svg, spoken), _grid(groups, measure, f"{title} by block")


def _grid(groups: Sequence[Kind], measure: LayerMeasure, caption: str) -> Grid:
    """Every number of a chart of layers; where a block has several matrices of a kind, their median."""
    blocks = sorted({block for kind in groups for block, _ in kind.layers if block != NO_BLOCK})

    def cell(block: int, kind: Kind) -> float | None:
        numbers = spread(getattr(row, measure) for at, row in kind.layers if at == block)
        return numbers.median if numbers else None

    rows = tuple((block, tuple(cell(block, kind) for kind in groups)) for block in blocks)
    return Grid(caption, tuple(kind.label for kind in groups), rows)
