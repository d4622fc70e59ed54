"""An evaluation as a terminal table, as the README.md of its folder, and as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Group, RenderableType

from deltaguard.reports import page
from deltaguard.reports.records.evaluation import Agreement, Comparison, EvaluationReport, Measure, SectionRow
from deltaguard.reports.table import Cell, Column, Table, estimate, indented, share
from deltaguard.reports.text import (
    DASH,
    Facts,
    capital,
    environment_facts,
    model_label,
    option_facts,
    plain,
    points,
    short_reference,
    times,
    without_folders,
)

SECONDARY = ("incoherent", "undecided", "missing")
"""Measures that qualify the others: in the tables, without a chart."""

MEANINGS = {
    "attack success": "harmful prompts answered instead of refused",
    "false refusal": "harmless prompts refused",
    "harmfulness": "mean score, from 1 for a full refusal to 5 for full compliance",
    "refusal probability": "mean probability of a refusal",
    "nll": "negative log-likelihood of the expected answers, nats a token",
}
"""What the common measures are."""

_PLACES = ("path", "file", "prompt_file", "cache", "model")
"""Settings whose values are places on the machine."""


def evaluation_table(report: EvaluationReport) -> RenderableType:
    """Draw all numbers for a terminal: a table a section, then what the comparisons support."""
    parts: list[RenderableType] = []
    for section in report.sections:
        parts.append(section_table(report, section).terminal())
        parts += [indented(line, style="dim") for line in _told(report, section)]
    parts += [indented(f"Note: {without_folders(note)}", above=1) for note in report.notes]
    return Group(*parts)


def evaluation_card(report: EvaluationReport) -> str:
    """Draw the README.md of an evaluation's folder: how it was run, all numbers, and what they do not say.

    Returns:
        Markdown; nothing in a name is read as markup, and no answer is quoted.
    """
    words = ("reference", "weights", "chat template")
    models = Table.of(
        "",
        (Column("model", "name"), *(Column(word, "words") for word in words)),
        [
            (
                model.name,
                short_reference(model.reference),
                (model.fingerprint or "not seen")[:16],
                (model.chat_template_hash or "not seen")[:16],
            )
            for model in report.models
        ],
    )
    run = Table.of(
        "",
        (Column("", "name"), Column("", "words")),
        (
            ("engine", report.engine),
            ("decoding", _decoding(report)),
            ("suite", f"{report.suite}, {report.suite_hash[:16]}"),
            *environment_facts(report.environment),
        ),
    )
    templates = page.environment()
    templates.filters["plain"] = plain
    return templates.get_template("evaluation.md.jinja").render(
        report=report,
        models=models.markdown(),
        sections=[
            (section, section_table(report, section).markdown(), _told(report, section))
            for section in report.sections
        ],
        harness=_harness_table(report).markdown() if report.harness else "",
        notes=[without_folders(note) for note in report.notes],
        run=run.markdown(),
    )


def evaluation_page(report: EvaluationReport) -> str:
    """Draw several models side by side: numbers with intervals, comparisons, judges, probes and answers.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.
    """
    names = [model_label(model.name) for model in report.models]
    probes = probe_tables(report)
    wrapped = "The same question in a wrapping that is meant to get round refusals."
    settings = yaml.safe_dump(shown_settings(report.settings), sort_keys=False, allow_unicode=True)
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
    blocks += [page.Heading("Probes"), page.Paragraph(wrapped), *probes] if probes else []
    blocks += _comparison_blocks(report) if report.comparisons else []
    blocks += _agreement_blocks(report) if report.agreements else []
    blocks += _sample_blocks(report) if report.samples else []
    blocks += [page.Heading("The run"), page.Pairs(_run_facts(report)), *_run_tables(report)]
    blocks.append(page.Folded("The suite as it was run", page.Listing(settings)))
    return page.page(
        f"eval · suite {report.suite}",
        f"deltaguard eval: {', '.join(names)}",
        blocks,
        created=report.environment.created,
        heading=", ".join(names),
        lead=_lead(report),
    )


def section_table(
    report: EvaluationReport, section: SectionRow, judges: Sequence[str | None] | None = None
) -> Table:
    """Tabulate the numbers of a section: a row a model and judge, a column a measure.

    Args:
        report: of a finished evaluation.
        section: one of its rows.
        judges: whose numbers, None for those that need no judge; all, with a column for them, if not given.
    """
    found = [m for m in measures_of(report, section) if judges is None or m.judge in judges]
    names = list(dict.fromkeys(measure.name for measure in found))
    told = list(dict.fromkeys(measure.judge for measure in found))
    judged = judges is None and any(told)
    by_place = {(m.judge, m.model, m.name): m.estimate for m in found}
    return Table.of(
        f"{section.title}: {section.prompts} prompts",
        (
            *((Column("judge", "name"),) if judged else ()),
            Column("model", "name"),
            *(Column(measure_label(name)) for name in names),
        ),
        [
            (
                *((each or DASH,) if judged else ()),
                model_cell(report, model.name),
                *(estimate(by_place.get((each, model.name, name))) for name in names),
            )
            for each in told
            for model in report.models
        ],
    )


def probe_tables(report: EvaluationReport) -> tuple[Table, ...]:
    """Tabulate what the probes changed, a table a measure and judge; the plain prompts come first."""
    probes = [section for section in report.sections if is_probe(section)]
    probed = {section.name.split("/")[0] for section in probes}
    sections = [s for s in report.sections if s.name in probed] + probes
    measures = [measure for section in sections for measure in measures_of(report, section)]
    tables: list[Table] = []
    for name, judge in dict.fromkeys((m.name, m.judge) for m in measures if m.name not in SECONDARY):
        found = {(m.section, m.model): m.estimate for m in measures if (m.name, m.judge) == (name, judge)}
        tables.append(
            Table.of(
                f"{capital(measure_label(name))} under probes",
                (Column("prompts", "words"), *(Column(model_label(model.name)) for model in report.models)),
                [
                    (
                        section.title,
                        *(estimate(found.get((section.name, model.name))) for model in report.models),
                    )
                    for section in sections
                ],
                note=f"judge {judge}" if judge else "",
            )
        )
    return tuple(tables)


def measure_label(name: str) -> str:
    """Write the name of a measure as people do.

    Example:
        >>> measure_label("nll"), measure_label("rouge-l"), measure_label("attack success")
        ('NLL', 'ROUGE-L', 'attack success')
    """
    return name.upper() if name == "nll" or name.startswith("rouge-") else name


def is_probe(section: SectionRow) -> bool:
    """Tell whether a section asks in a wrapping that is meant to get round refusals."""
    return section.kind == "attack" and "/" in section.name


def measures_of(report: EvaluationReport, section: SectionRow) -> tuple[Measure, ...]:
    """Pick all numbers of a section, in the report's order."""
    return tuple(measure for measure in report.measures if measure.section == section.name)


def model_cell(report: EvaluationReport, name: str) -> Cell:
    """Make a cell of a model's name, in its colour."""
    return Cell(model_label(name), tint=_tint(report, name))


def comparison_line(comparison: Comparison, prompts: int) -> str:
    """Say what a comparison supports, with its numbers.

    Args:
        comparison: of two models.
        prompts: how many its section has; said where the comparison rests on fewer.
    """
    judge = f" ({comparison.judge})" if comparison.judge else ""
    p_value = p_text(comparison.p_value)
    sign = "" if p_value.startswith("<") else "= "
    unit = " points" if comparison.test == "mcnemar" else ""
    difference = _difference(comparison)
    pairs = _pairs(comparison, prompts)
    return (
        f"{comparison.model}: {measure_label(comparison.name)}{judge} {finding_text(comparison)}, "
        f"{difference.text}{unit} [{difference.interval}], p {sign}{p_value}"
        + (f", over {pairs}" if pairs else "")
    )


def agreement_line(agreement: Agreement) -> str:
    """Say how far two judges agree, with the number of answers."""
    return (
        f"{agreement.first} and {agreement.second} agree on {agreement.agreed} of {agreement.total} answers, "
        f"kappa {_kappa(agreement).text}"
    )


def finding_text(comparison: Comparison) -> str:
    """Say what the interval supports, in words, and nothing beyond.

    Example:
        ```python
        finding_text(report.comparisons[0])  # "not told apart from aligned"
        ```
    """
    link = "from" if comparison.finding == "not told apart" else "than"
    return f"{comparison.finding} {link} {comparison.reference}"


def p_text(value: float) -> str:
    """Write a p-value with two significant digits, a bound where it is tiny.

    Example:
        >>> p_text(0.0132), p_text(1e-9), p_text(1.0)
        ('0.013', '< 0.001', '1')
    """
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


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


def _told(report: EvaluationReport, section: SectionRow) -> list[str]:
    """What the comparisons of a section support, but those that only qualify others; how judges agree."""
    compared = [c for c in report.comparisons if c.section == section.name and c.name not in SECONDARY]
    agreed = [agreement for agreement in report.agreements if agreement.section == section.name]
    return [*(comparison_line(each, section.prompts) for each in compared), *map(agreement_line, agreed)]


def _lead(report: EvaluationReport) -> str:
    """What a reader wants first: attack success of every model as the first judge tells it."""
    found = [measure for measure in report.measures if measure.name == "attack success"]
    if not found:
        return ""
    first = found[0]
    judge = f", as the judge {first.judge} tells it" if first.judge else ""
    told = [
        page.strong(f"{estimate(m.estimate).text} {model_label(m.model)}", _tint(report, m.model))
        for m in found
        if (m.section, m.judge) == (first.section, first.judge)
    ]
    places = ", ".join("{}" for _ in told)
    return page.sentence(f"Harmful prompts answered instead of refused{{}}: {places}.", judge, *told)


def _section_blocks(report: EvaluationReport, section: SectionRow) -> list[page.Block]:
    from deltaguard.reports.charts import Mark, marks_chart

    found = measures_of(report, section)
    names = [model_label(model.name) for model in report.models]
    parts: list[page.Chart | Table | page.Section] = []
    for name in dict.fromkeys(m.name for m in found if m.name not in SECONDARY):
        measures = [measure for measure in found if measure.name == name]
        cells = [estimate(measure.estimate) for measure in measures]
        spoken = "; ".join(
            f"{model_label(m.model)} {shown.text}, interval {shown.interval}"
            + (f", told by {m.judge}" if m.judge else "")
            for m, shown in zip(measures, cells, strict=True)
        )
        marks = [
            Mark(
                model_label(m.model),
                m.judge or "",
                m.estimate.low,
                m.estimate.value,
                m.estimate.high,
                shown.text,
            )
            for m, shown in zip(measures, cells, strict=True)
        ]
        better = f"{measures[0].better} is better"
        note = f"{MEANINGS[name]}\n{better}" if name in MEANINGS else better
        svg = marks_chart(marks, names, shares=all(m.estimate.interval == "wilson" for m in measures))
        parts.append(page.Chart(capital(measure_label(name)), note, svg, f"{name}: {spoken}."))
    for judge in dict.fromkeys(measure.judge for measure in found):
        title = f"Judge {judge}" if judge else "Without a judge"
        table = section_table(report, section, (judge,))
        parts.append(Table(title, table.columns, table.rows, table.note))
    source = page.Paragraph(f"{section.prompts} prompts; {section.source}", soft=True)
    return [page.Heading(section.title), source, page.Group(parts, "columns")]


def _comparison_blocks(report: EvaluationReport) -> list[page.Block]:
    titles = {section.name: section.title for section in report.sections}
    sizes = {section.name: section.prompts for section in report.sections}
    first = model_label(report.models[0].name)
    rows: list[tuple[Cell | str, ...]] = []
    for row in report.comparisons:
        difference, pairs = _difference(row), _pairs(row, sizes[row.section])
        rows.append(
            (
                model_cell(report, row.model),
                titles[row.section],
                Cell(measure_label(row.name), note=f"judge {row.judge}" if row.judge else ""),
                Cell(difference.text, difference.value, difference.interval, note=pairs),
                Cell(p_text(row.p_value), row.p_value, note=row.test),
                finding_text(row),
            )
        )
    words = Column("prompts", "words"), Column("measure", "words")
    table = Table.of(
        "Comparisons",
        (Column("model", "name"), *words, "difference", "p", Column("what the interval supports", "words")),
        rows,
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
        (Column("judges", "name"), Column("prompts", "words"), "kappa", "agreed", "answers"),
        [
            (
                f"{row.first}, {row.second}",
                titles[row.section],
                _kappa(row),
                share(row.agreed / row.total if row.total else None),
                row.total,
            )
            for row in report.agreements
        ],
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
                page.Answer(name, _tint(report, name), answer, sample.verdicts.get(name, {}))
                for name, answer in sample.answers.items()
            ],
        )
        for number, sample in enumerate(report.samples, start=1)
    ]
    return [page.Heading("Answers side by side"), page.Paragraph(told), *asked]


def _run_tables(report: EvaluationReport) -> list[page.Block]:
    hashed = Column("sha256", "words", code=True, sorts=False)
    prompts = Table.of(
        "Prompts",
        (Column("section", "name", code=True), "prompts", "tokens at most", hashed),
        [(s.name, s.prompts, s.max_new_tokens, s.prompts_hash) for s in report.sections],
        note="sha256 of the prompts as the models got them",
    )
    files = Table.of(
        "Files with every answer", (Column("file", "name", code=True), hashed), report.files.items()
    )
    tables: list[page.Block] = [prompts]
    tables += [_harness_table(report)] if report.harness else []
    return [*tables, files] if report.files else tables


def _harness_table(report: EvaluationReport) -> Table:
    return Table.of(
        "Tasks of lm-eval",
        (
            Column("model", "name"),
            Column("task", "words"),
            "version",
            "examples shown",
            "chat template",
            "questions",
            "lm-eval",
        ),
        [
            (
                model_cell(report, task.model),
                task.task,
                task.version,
                "differ" if task.n_shot is None else task.n_shot,
                "applied" if task.chat_template else "not applied",
                task.samples,
                task.harness_version,
            )
            for task in report.harness
        ],
        note="only numbers of like tasks compare",
    )


def _run_facts(report: EvaluationReport) -> Facts:
    told = "{}, fingerprint {}, chat template {}"
    models = tuple(
        (
            f"model {m.name}",
            told.format(short_reference(m.reference), m.fingerprint or DASH, m.chat_template_hash or DASH),
        )
        for m in report.models
    )
    return (
        *environment_facts(report.environment),
        ("suite", f"{report.suite}, sha256 {report.suite_hash}"),
        ("engine", report.engine),
        ("decoding", _decoding(report)),
        ("time by stage", times(report.seconds)),
        *models,
    )


def _decoding(report: EvaluationReport) -> str:
    return ", ".join(f"{name} {value}" for name, value in option_facts(report.decoding))


def _difference(comparison: Comparison) -> Cell:
    """How far two models lie apart, in points where shares of prompts are compared."""
    ends = (comparison.difference, comparison.low, comparison.high)
    scaled = comparison.test == "mcnemar"
    shown, low, high = (points(100 * end) if scaled else f"{end:+.3g}" for end in ends)
    return Cell(shown, comparison.difference, f"{low} to {high}")


def _pairs(comparison: Comparison, prompts: int) -> str:
    """How many prompts a comparison rests on, where some had to be left out; empty where none were."""
    return "" if comparison.total == prompts else f"{comparison.total} of {prompts} prompts"


def _kappa(agreement: Agreement) -> Cell:
    kappa = agreement.kappa
    return Cell(DASH if kappa is None else f"{kappa:.2f}", kappa)


def _tint(report: EvaluationReport, name: str) -> str:
    return f"c{[model.name for model in report.models].index(name) % 10}"
