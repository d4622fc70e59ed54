"""What the pages of an evaluation pick from its report."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaguard.reports.records.evaluation import Comparison, Estimate, EvaluationReport, Measure, SectionRow
from deltaguard.reports.text import DASH, interval, number, percent, points

SECONDARY = ("incoherent", "undecided", "missing")
"""Measures that qualify the others: in the tables, without a chart."""


@dataclass(frozen=True)
class MeasureTable:
    """Numbers of all models, as one judge tells them.

    Attributes:
        judge: who told; None where no judge was needed.
        names: what was measured, a column each.
        rows: a model and its numbers, None where one was not measured.
    """

    judge: str | None
    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Measure | None, ...]], ...]


@dataclass(frozen=True)
class ProbeTable:
    """One measure of all models on the plain prompts and under each probe, as one judge tells it.

    Attributes:
        name: what was measured.
        judge: who told.
        models: a column each.
        rows: title of a section and the numbers, None where one was not measured.
    """

    name: str
    judge: str | None
    models: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Measure | None, ...]], ...]


def measure_label(name: str) -> str:
    """The name of a measure as people write it.

    Example:
        >>> measure_label("nll"), measure_label("rouge-l"), measure_label("attack success")
        ('NLL', 'ROUGE-L', 'attack success')
    """
    return name.upper() if name == "nll" or name.startswith("rouge-") else name


def is_probe(section: SectionRow) -> bool:
    """Whether a section asks in a wrapping that is meant to get round refusals."""
    return section.kind == "attack" and "/" in section.name


def plain_sections(report: EvaluationReport) -> tuple[SectionRow, ...]:
    """The sections that are no probes, in the report's order."""
    return tuple(section for section in report.sections if not is_probe(section))


def measures_of(report: EvaluationReport, section: SectionRow) -> tuple[Measure, ...]:
    """All numbers of a section, in the report's order."""
    return tuple(measure for measure in report.measures if measure.section == section.name)


def charted(measures: Sequence[Measure]) -> dict[str, tuple[Measure, ...]]:
    """The numbers that deserve a chart, by what was measured."""
    names = dict.fromkeys(measure.name for measure in measures if measure.name not in SECONDARY)
    return {name: tuple(measure for measure in measures if measure.name == name) for name in names}


def measure_tables(report: EvaluationReport, section: SectionRow) -> tuple[MeasureTable, ...]:
    """The numbers of a section, a table a judge."""
    measures = measures_of(report, section)
    judges = dict.fromkeys(measure.judge for measure in measures)
    return tuple(
        _table(report, judge, [measure for measure in measures if measure.judge == judge]) for judge in judges
    )


def probe_tables(report: EvaluationReport) -> tuple[ProbeTable, ...]:
    """What the probes changed, a table a measure and judge; the plain prompts come first."""
    probes = [section for section in report.sections if is_probe(section)]
    probed = {section.name.split("/")[0] for section in probes}
    rows = [s for s in report.sections if s.name in probed] + probes
    measures = [measure for section in rows for measure in measures_of(report, section)]
    keys = dict.fromkeys((m.name, m.judge) for m in measures if m.name not in SECONDARY)
    return tuple(_probes(report, rows, measures, *key) for key in keys)


def is_share(estimate: Estimate) -> bool:
    """Whether a number counts prompts, so that percent is its unit."""
    return estimate.interval == "wilson"


def value_text(estimate: Estimate) -> str:
    """An estimate in its own unit."""
    return percent(estimate.value) if is_share(estimate) else number(estimate.value)


def bounds_text(estimate: Estimate) -> str:
    """The interval of an estimate, in its own unit."""
    return interval(estimate) if is_share(estimate) else f"{number(estimate.low)} to {number(estimate.high)}"


def difference_text(comparison: Comparison) -> str:
    """How far two models lie apart, in points where shares of prompts are compared."""
    return _difference(comparison, comparison.difference)


def difference_bounds(comparison: Comparison) -> str:
    """The interval of a difference, in the same unit."""
    return f"{_difference(comparison, comparison.low)} to {_difference(comparison, comparison.high)}"


def pairs_text(comparison: Comparison, prompts: int) -> str:
    """How many prompts a comparison rests on, where some had to be left out; empty where none were.

    Args:
        comparison: of two models.
        prompts: how many its section has.
    """
    return "" if comparison.total == prompts else f"{comparison.total} of {prompts} prompts"


def finding_text(comparison: Comparison) -> str:
    """What the interval supports, in words, and nothing beyond.

    Example:
        ```python
        finding_text(report.comparisons[0])  # "not told apart from aligned"
        ```
    """
    link = "from" if comparison.finding == "not told apart" else "than"
    return f"{comparison.finding} {link} {comparison.reference}"


def p_text(value: float) -> str:
    """A p-value with two significant digits, a bound where it is tiny.

    Example:
        >>> p_text(0.0132), p_text(1e-9), p_text(1.0)
        ('0.013', '< 0.001', '1')
    """
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def kappa_text(kappa: float | None) -> str:
    """Cohen's kappa with two decimals, a dash where it is not defined."""
    return DASH if kappa is None else f"{kappa:.2f}"


def _difference(comparison: Comparison, value: float) -> str:
    if comparison.test == "mcnemar":
        return points(100 * value)
    return f"{value:+.3g}"


def _table(report: EvaluationReport, judge: str | None, measures: Sequence[Measure]) -> MeasureTable:
    names = tuple(dict.fromkeys(measure.name for measure in measures))
    found = {(measure.model, measure.name): measure for measure in measures}
    rows = tuple(
        (model.name, tuple(found.get((model.name, name)) for name in names)) for model in report.models
    )
    return MeasureTable(judge, names, rows)


def _probes(
    report: EvaluationReport,
    sections: Sequence[SectionRow],
    measures: Sequence[Measure],
    name: str,
    judge: str | None,
) -> ProbeTable:
    models = tuple(model.name for model in report.models)
    found = {(m.section, m.model): m for m in measures if (m.name, m.judge) == (name, judge)}
    rows = tuple(
        (section.title, tuple(found.get((section.name, model)) for model in models)) for section in sections
    )
    return ProbeTable(name, judge, models, rows)
