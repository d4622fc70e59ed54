"""An evaluation as a terminal table, as the README.md of its folder, and as a page."""

from collections.abc import Sequence
from functools import partial

from rich.console import Group, RenderableType

from deltaguard.reports import page
from deltaguard.reports.records.evaluation import (
    SECOND_ATTACK,
    Agreement,
    Comparison,
    EvaluationReport,
    Measure,
    SectionRow,
)
from deltaguard.reports.table import Cell, Column, Table, estimate, facts_table, indented
from deltaguard.reports.text import (
    DASH,
    capital,
    environment_facts,
    model_label,
    option_facts,
    points,
    short_reference,
    without_folders,
)

SECONDARY = ("incoherent", "undecided", "missing")
"""Measures that qualify the others: in the tables, without a chart."""


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
    models = Table.of(
        "",
        report.models,
        (
            (Column("model", "name"), lambda model: model.name),
            (Column("reference", "words"), lambda model: short_reference(model.reference)),
            (Column("weights", "words"), lambda model: (model.fingerprint or "not seen")[:16]),
            (Column("chat template", "words"), lambda model: (model.chat_template_hash or "not seen")[:16]),
        ),
    )
    run = (
        ("engine", report.engine),
        ("decoding", decoding(report)),
        ("suite", f"{report.suite}, {report.suite_hash[:16]}"),
        *environment_facts(report.environment),
    )
    return page.rendered(
        "evaluation.md.jinja",
        report=report,
        models=models.markdown(),
        sections=[
            (section, section_table(report, section).markdown(), _told(report, section))
            for section in report.sections
        ],
        harness=harness_table(report).markdown() if report.harness else "",
        notes=[without_folders(note) for note in report.notes],
        run=facts_table("", run).markdown(),
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

    def number(name: str, row: tuple[str | None, str]) -> Cell:
        return estimate(by_place.get((*row, name)))

    judge = (Column("judge", "name"), lambda row: row[0] or DASH)
    return Table.of(
        f"{section.title}: {prompts}" if (prompts := prompts_text(section)) else section.title,
        [(each, model.name) for each in told for model in report.models],
        (
            *((judge,) if judged else ()),
            (Column("model", "name"), lambda row: model_cell(report, row[1])),
            # A terminal has room for a narrow head: `quality, first turn` takes two lines.
            *((measure_label(name).replace(", ", ",\n"), partial(number, name)) for name in names),
        ),
    )


def probe_tables(report: EvaluationReport) -> tuple[Table, ...]:
    """Tabulate what the probes changed, a table a measure and judge; the plain prompts come first."""
    probes = [section for section in report.sections if is_probe(section)]
    probed = {section.name.split("/")[0] for section in probes}
    sections = [s for s in report.sections if s.name in probed] + probes
    measures = [measure for section in sections for measure in measures_of(report, section)]
    found = {(m.name, m.judge, m.model, m.section): m.estimate for m in measures}

    def number(name: str, judge: str | None, model: str, section: SectionRow) -> Cell:
        return estimate(found.get((name, judge, model, section.name)))

    tables: list[Table] = []
    for name, judge in dict.fromkeys((m.name, m.judge) for m in measures if m.name not in SECONDARY):
        columns = (
            (Column("prompts", "words"), lambda section: section.title),
            *((model_label(model.name), partial(number, name, judge, model.name)) for model in report.models),
        )
        title = f"{capital(measure_label(name))} under probes"
        tables.append(Table.of(title, sections, columns, note=f"judge {judge}" if judge else ""))
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
    _, _, way = section.name.partition("/")
    return section.kind == "attack" and way not in ("", SECOND_ATTACK)


def measures_of(report: EvaluationReport, section: SectionRow) -> tuple[Measure, ...]:
    """Pick all numbers of a section, in the report's order."""
    return tuple(measure for measure in report.measures if measure.section == section.name)


def model_cell(report: EvaluationReport, name: str) -> Cell:
    """Make a cell of a model's name, in its colour."""
    return Cell(model_label(name), tint=model_tint(report, name))


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
    difference = difference_cell(comparison)
    pairs = pairs_text(comparison, prompts)
    return (
        f"{comparison.model}: {measure_label(comparison.name)}{judge} {finding_text(comparison)}, "
        f"{difference.text}{unit} [{difference.interval}], p {sign}{p_value}"
        + (f", over {pairs}" if pairs else "")
    )


def agreement_line(agreement: Agreement) -> str:
    """Say how far two judges agree, with the number of answers."""
    return (
        f"{agreement.first} and {agreement.second} agree on {agreement.agreed} of {agreement.total} answers, "
        f"kappa {kappa_cell(agreement).text}"
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


def _told(report: EvaluationReport, section: SectionRow) -> list[str]:
    """Say what the comparisons of a section support, but those that only qualify others; how judges agree."""
    compared = [c for c in report.comparisons if c.section == section.name and c.name not in SECONDARY]
    agreed = [agreement for agreement in report.agreements if agreement.section == section.name]
    return [*(comparison_line(each, section.prompts) for each in compared), *map(agreement_line, agreed)]


def harness_table(report: EvaluationReport) -> Table:
    """Tabulate how tasks of lm-eval were put to each model."""
    return Table.of(
        "Tasks of lm-eval",
        report.harness,
        (
            (Column("model", "name"), lambda task: model_cell(report, task.model)),
            (Column("task", "words"), lambda task: task.task),
            ("version", lambda task: task.version),
            ("examples shown", lambda task: "differ" if task.n_shot is None else task.n_shot),
            ("chat template", lambda task: "applied" if task.chat_template else "not applied"),
            ("questions", lambda task: task.samples),
            ("lm-eval", lambda task: task.harness_version),
        ),
        note="only numbers of like tasks compare",
    )


def decoding(report: EvaluationReport) -> str:
    """Say how answers were drawn."""
    return ", ".join(f"{name} {value}" for name, value in option_facts(report.decoding))


def difference_cell(comparison: Comparison) -> Cell:
    """Make a cell of how far two models lie apart, in points where shares of prompts are compared."""
    ends = (comparison.difference, comparison.low, comparison.high)
    scaled = comparison.test == "mcnemar"
    shown, low, high = (points(100 * end) if scaled else f"{end:+.3g}" for end in ends)
    return Cell(shown, comparison.difference, f"{low} to {high}")


def prompts_text(section: SectionRow) -> str:
    """Say how many prompts a section puts to the models; empty where lm-eval brings its own."""
    return f"{section.prompts} prompts" if section.prompts else ""


def pairs_text(comparison: Comparison, prompts: int) -> str:
    """Say how many prompts a comparison rests on, where some were left out; empty where none were."""
    return "" if comparison.total == prompts else f"{comparison.total} of {prompts} prompts"


def kappa_cell(agreement: Agreement) -> Cell:
    """Make a cell of Cohen's kappa, a dash where it is not defined."""
    kappa = agreement.kappa
    return Cell(DASH if kappa is None else f"{kappa:.2f}", kappa)


def model_tint(report: EvaluationReport, name: str) -> str:
    """Find the colour of a model by its place in the report."""
    return f"c{[model.name for model in report.models].index(name) % 10}"
