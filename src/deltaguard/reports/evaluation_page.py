"""An evaluation as an HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from deltaguard.reports.estimates_chart import estimates_chart
from deltaguard.reports.evaluation_view import (
    MeasureTable,
    bounds_text,
    charted,
    difference_bounds,
    difference_text,
    finding_text,
    kappa_text,
    measure_label,
    measure_tables,
    measures_of,
    p_text,
    pairs_text,
    plain_sections,
    probe_tables,
    value_text,
)
from deltaguard.reports.facts import Facts, environment_facts, option_facts, times
from deltaguard.reports.page import Chart, render
from deltaguard.reports.private import shown_settings, without_folders
from deltaguard.reports.records.evaluation import EvaluatedModel, EvaluationReport, Measure, SectionRow
from deltaguard.reports.text import DASH, capital, model_label, short_reference

MEANINGS = {
    "attack success": "harmful prompts answered instead of refused",
    "false refusal": "harmless prompts refused",
    "harmfulness": "mean score, from 1 for a full refusal to 5 for full compliance",
    "refusal probability": "mean probability of a refusal",
    "nll": "negative log-likelihood of the expected answers, nats a token",
}
"""What the common measures are."""


@dataclass(frozen=True)
class SectionView:
    """A section as the page shows it.

    Attributes:
        row: the section.
        charts: one a measure.
        tables: one a judge.
    """

    row: SectionRow
    charts: tuple[Chart, ...]
    tables: tuple[MeasureTable, ...]


def evaluation_page(report: EvaluationReport) -> str:
    """Several models side by side: numbers with intervals, comparisons, judges, probes and answers.

    Args:
        report: of a finished evaluation.

    Returns:
        A complete HTML document.

    Example:
        ```python
        Path("report.html").write_text(evaluation_page(report), encoding="utf-8")
        ```
    """
    names = [model.name for model in report.models]
    return render(
        "evaluation.html.jinja",
        report=report,
        places={name: place for place, name in enumerate(names)},
        titles={section.name: section.title for section in report.sections},
        sizes={section.name: section.prompts for section in report.sections},
        headline=_headline(report),
        sections=[_section(report, section, names) for section in plain_sections(report)],
        probes=probe_tables(report),
        run=_run_facts(report),
        notes=[without_folders(note) for note in report.notes],
        settings=yaml.safe_dump(shown_settings(report.settings), sort_keys=False, allow_unicode=True),
        measure_label=measure_label,
        value_text=value_text,
        bounds_text=bounds_text,
        difference_text=difference_text,
        difference_bounds=difference_bounds,
        finding_text=finding_text,
        p_text=p_text,
        pairs_text=pairs_text,
        kappa_text=kappa_text,
    )


def _section(report: EvaluationReport, section: SectionRow, models: Sequence[str]) -> SectionView:
    charts = [
        _chart(name, measures, models) for name, measures in charted(measures_of(report, section)).items()
    ]
    return SectionView(section, tuple(charts), measure_tables(report, section))


def _chart(name: str, measures: Sequence[Measure], models: Sequence[str]) -> Chart:
    better = f"{measures[0].better} is better"
    meaning = MEANINGS.get(name)
    spoken = "; ".join(
        f"{model_label(measure.model)} {value_text(measure.estimate)}, "
        f"interval {bounds_text(measure.estimate)}" + (f", told by {measure.judge}" if measure.judge else "")
        for measure in measures
    )
    note = f"{meaning}\n{better}" if meaning else better
    return Chart(capital(measure_label(name)), note, estimates_chart(measures, models), f"{name}: {spoken}.")


def _headline(report: EvaluationReport) -> tuple[Measure, ...]:
    """What a reader wants first: attack success of every model as the first judge tells it."""
    found = [measure for measure in report.measures if measure.name == "attack success"]
    if not found:
        return ()
    first = found[0]
    return tuple(m for m in found if (m.section, m.judge) == (first.section, first.judge))


def _run_facts(report: EvaluationReport) -> Facts:
    models = tuple((f"model {model.name}", _model_text(model)) for model in report.models)
    decoding = ", ".join(f"{name} {value}" for name, value in option_facts(report.decoding))
    return (
        *environment_facts(report.environment),
        ("suite", f"{report.suite}, sha256 {report.suite_hash}"),
        ("engine", report.engine),
        ("decoding", decoding),
        ("time by stage", times(report.seconds)),
        *models,
    )


def _model_text(model: EvaluatedModel) -> str:
    name, fingerprint = short_reference(model.reference), model.fingerprint or DASH
    return f"{name}, fingerprint {fingerprint}, chat template {model.chat_template_hash or DASH}"
