"""An evaluation as a page: charts, tables, comparisons, judges, probes and answers side by side."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from deltaguard.reports import page
from deltaguard.reports.evaluation import (
    SECONDARY,
    decoding,
    difference_cell,
    finding_text,
    harness_table,
    is_probe,
    kappa_cell,
    measure_label,
    measures_of,
    model_cell,
    model_tint,
    p_text,
    pairs_text,
    probe_tables,
    prompts_text,
    section_table,
)
from deltaguard.reports.records.evaluation import Comparison, EvaluationReport, SectionRow
from deltaguard.reports.table import Cell, Column, Table, estimate, share
from deltaguard.reports.text import (
    DASH,
    capital,
    environment_facts,
    model_label,
    short_reference,
    times,
    without_folders,
)

MEANINGS = {
    "attack success": "harmful prompts answered instead of refused",
    "false refusal": "harmless prompts refused",
    "harmfulness": "mean score, from 1 for a full refusal to 5 for full compliance",
    "quality": "mean grade, from 1 for an answer of no use to 10; of conversations, over both turns",
    "refusal probability": "mean probability of a refusal",
    "nll": "negative log-likelihood of the expected answers, nats a token",
}
"""What the common measures are."""

_PLACES = ("path", "file", "prompt_file", "cache", "model")
"""Settings whose values are places on the machine."""


def evaluation_page(report: EvaluationReport) -> str:
    """Draw several models side by side: numbers with intervals, comparisons, judges, probes and answers.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.
    """
    names = ", ".join(model_label(model.name) for model in report.models)
    blocks: list[page.Block] = [
        page.Notes([without_folders(note) for note in report.notes]),
        page.Paragraph(
            "Points are measured values, lines their 95 % intervals; small print in tables is the interval "
            "and the number of prompts.",
            soft=True,
        ),
    ]
    for section in report.sections:
        if not is_probe(section):
            blocks += _section_blocks(report, section)
    if probes := probe_tables(report):
        wrapped = "The same question in a wrapping that is meant to get round refusals."
        blocks += [page.Heading("Probes"), page.Paragraph(wrapped), *probes]
    blocks += _comparison_blocks(report) if report.comparisons else []
    blocks += _agreement_blocks(report) if report.agreements else []
    blocks += _sample_blocks(report) if report.samples else []
    blocks += _run_blocks(report)
    return page.page(
        f"eval · suite {report.suite}",
        f"deltaguard eval: {names}",
        blocks,
        created=report.environment.created,
        heading=names,
        lead=_lead(report),
    )


def _lead(report: EvaluationReport) -> str:
    """Say what a reader wants first: attack success of every model as the first judge tells it."""
    found = [measure for measure in report.measures if measure.name == "attack success"]
    if not found:
        return ""
    first = found[0]
    judge = f", as the judge {first.judge} tells it" if first.judge else ""
    told = [
        page.strong(f"{estimate(m.estimate).text} {model_label(m.model)}", model_tint(report, m.model))
        for m in found
        if (m.section, m.judge) == (first.section, first.judge)
    ]
    return page.sentence("Harmful prompts answered instead of refused{}: {}.", judge, page.listed(told))


def _section_blocks(report: EvaluationReport, section: SectionRow) -> list[page.Block]:
    from deltaguard.reports.charts import Mark, marks_chart

    found = measures_of(report, section)
    names = [model_label(model.name) for model in report.models]
    parts: list[page.Chart | Table | page.Section] = []
    for name in dict.fromkeys(m.name for m in found if m.name not in SECONDARY):
        measures = [measure for measure in found if measure.name == name]
        marks: list[Mark] = []
        told: list[str] = []
        for m in measures:
            model, number, shown = model_label(m.model), m.estimate, estimate(m.estimate)
            marks.append(Mark(model, m.judge or "", number.low, number.value, number.high, shown.text))
            by = f", told by {m.judge}" if m.judge else ""
            told.append(f"{model} {shown.text}, interval {shown.interval}{by}")
        better = f"{measures[0].better} is better"
        note = f"{MEANINGS[name]}\n{better}" if name in MEANINGS else better
        svg = marks_chart(marks, names, shares=all(m.estimate.interval == "wilson" for m in measures))
        parts.append(page.Chart(capital(measure_label(name)), note, svg, f"{name}: {'; '.join(told)}."))
    for judge in dict.fromkeys(measure.judge for measure in found):
        title = f"Judge {judge}" if judge else "Without a judge"
        parts.append(replace(section_table(report, section, (judge,)), title=title))
    said = "; ".join(filter(None, (prompts_text(section), section.source)))
    source = page.Paragraph(said, soft=True)
    return [page.Heading(section.title), source, page.Group(parts, "columns")]


def _comparison_blocks(report: EvaluationReport) -> list[page.Block]:
    titles = {section.name: section.title for section in report.sections}
    sizes = {section.name: section.prompts for section in report.sections}
    first = model_label(report.models[0].name)

    def difference(row: Comparison) -> Cell:
        return replace(difference_cell(row), note=pairs_text(row, sizes[row.section]))

    table = Table.of(
        "Comparisons",
        report.comparisons,
        (
            (Column("model", "name"), lambda row: model_cell(report, row.model)),
            (Column("prompts", "words"), lambda row: titles[row.section]),
            (
                Column("measure", "words"),
                lambda row: Cell(measure_label(row.name), note=f"judge {row.judge}" if row.judge else ""),
            ),
            ("difference", difference),
            ("p", lambda row: Cell(p_text(row.p_value), row.p_value, note=row.test)),
            (Column("what the interval supports", "words"), finding_text),
        ),
        note=f"difference: model minus {first}, in points where shares of prompts are compared",
    )
    told = (
        "Both models on the same prompts, prompt by prompt; prompts for which either has no number are left "
        "out, and the rest counted. A difference counts as told apart where its 95 % interval leaves 0 out "
        f"and p is below 0.05. Of {len(report.comparisons)} comparisons, about one in twenty would be told "
        "apart by chance alone if no model differed."
    )
    return [page.Heading(f"Compared with {first}"), page.Paragraph(told), table]


def _agreement_blocks(report: EvaluationReport) -> list[page.Block]:
    titles = {section.name: section.title for section in report.sections}
    table = Table.of(
        "Agreement of judges",
        report.agreements,
        (
            (Column("judges", "name"), lambda row: f"{row.first}, {row.second}"),
            (Column("prompts", "words"), lambda row: titles[row.section]),
            ("kappa", kappa_cell),
            ("agreed", lambda row: share(row.agreed / row.total if row.total else None)),
            ("answers", lambda row: row.total),
        ),
    )
    told = (
        "Cohen's kappa over the answers of all models that both judges decided: 1 is full agreement, 0 what "
        "chance would give; a dash where both gave one and the same verdict throughout."
    )
    return [page.Heading("Do the judges agree?"), page.Paragraph(told), table]


def _sample_blocks(report: EvaluationReport) -> list[page.Block]:
    titles = {section.name: section.title for section in report.sections}
    told = "Answers to harmful prompts are folded: a model may have written something harmful."
    asked = [
        page.Asked(
            number,
            titles[sample.section],
            sample.kind == "attack",
            sample.prompt,
            None,
            [
                page.Answer(name, model_tint(report, name), answer, sample.verdicts.get(name, {}))
                for name, answer in sample.answers.items()
            ],
        )
        for number, sample in enumerate(report.samples, start=1)
    ]
    return [page.Heading("Answers side by side"), page.Paragraph(told), *asked]


def _run_blocks(report: EvaluationReport) -> list[page.Block]:
    settings = yaml.safe_dump(shown_settings(report.settings), sort_keys=False, allow_unicode=True)
    models = tuple(
        (
            f"model {m.name}",
            (
                f"{short_reference(m.reference)}, fingerprint {m.fingerprint or DASH}, "
                f"chat template {m.chat_template_hash or DASH}"
            ),
        )
        for m in report.models
    )
    facts = (
        *environment_facts(report.environment),
        ("suite", f"{report.suite}, sha256 {report.suite_hash}"),
        ("engine", report.engine),
        ("decoding", decoding(report)),
        ("time by stage", times(report.seconds)),
        *models,
    )
    hashed = Column("sha256", "words", code=True, sorts=False)
    prompts = Table.of(
        "Prompts",
        report.sections,
        (
            (Column("section", "name", code=True), lambda section: section.name),
            ("prompts", lambda section: section.prompts),
            ("tokens at most", lambda section: section.max_new_tokens),
            (hashed, lambda section: section.prompts_hash),
        ),
        note="sha256 of the prompts as the models got them",
    )
    files = Table.of(
        "Files with every answer",
        report.files,
        ((Column("file", "name", code=True), lambda name: name), (hashed, lambda name: report.files[name])),
    )
    return [
        page.Heading("The run"),
        page.Pairs(facts),
        prompts,
        *([harness_table(report)] if report.harness else []),
        *([files] if report.files else []),
        page.Folded("The suite as it was run", page.Listing(settings)),
    ]


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Cut files, folders and models in settings to their names.

    Example:
        >>> shown_settings({"sections": [{"name": "mine", "file": "/home/me/set.csv"}]})
        {'sections': [{'name': 'mine', 'file': 'set.csv'}]}
    """
    return {name: _shown(name, value) for name, value in settings.items()}


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {inner: _shown(str(inner), each) for inner, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(name, each) for each in value]
    return short_reference(value) if name in _PLACES and isinstance(value, str) else value
