"""An evaluation as a terminal table and as the README.md of its folder."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deltaguard.reports.evaluation_view import (
    SECONDARY,
    MeasureTable,
    bounds_text,
    difference_bounds,
    difference_text,
    finding_text,
    kappa_text,
    measure_label,
    measure_tables,
    p_text,
    pairs_text,
    value_text,
)
from deltaguard.reports.facts import environment_facts
from deltaguard.reports.private import without_folders
from deltaguard.reports.records.evaluation import Agreement, Comparison, EvaluationReport, Measure, SectionRow
from deltaguard.reports.templating import environment
from deltaguard.reports.text import DASH, plain


def evaluation_table(report: EvaluationReport) -> RenderableType:
    """All numbers, a table a section: below each number its 95 % interval, then what the comparisons support.

    Args:
        report: of a finished evaluation.

    Returns:
        Something rich can print; made for 80 columns, numbers are never cut.

    Example:
        ```python
        Console(stderr=True).print(evaluation_table(report))
        ```
    """
    parts: list[RenderableType] = []
    for section in report.sections:
        parts += [Text(), Text(f" {section.title}: {section.prompts} prompts", "bold"), Text()]
        parts.append(_section_table(measure_tables(report, section)))
        lines = [
            *(comparison_line(each, section.prompts) for each in compared(report, section)),
            *map(agreement_line, agreed(report, section)),
        ]
        parts += [Padding(Text(line, "dim"), (0, 0, 0, 1)) for line in lines]
    parts += [Padding(Text(f"Note: {without_folders(note)}"), (1, 0, 0, 1)) for note in report.notes]
    return Group(*parts)


def evaluation_card(report: EvaluationReport) -> str:
    """The README.md of an evaluation's folder: how it was run, all numbers, and what they do not say.

    Args:
        report: of a finished evaluation.

    Returns:
        Markdown; nothing in a name is read as markup, and no answer is quoted.
    """
    templates = environment()
    templates.filters.update(
        plain=plain,
        without_folders=without_folders,
        cell=_cell,
        agreement_line=agreement_line,
        p_text=p_text,
    )
    sections = [
        (
            section,
            _rows(measure_tables(report, section)),
            [comparison_line(each, section.prompts) for each in compared(report, section)],
            agreed(report, section),
        )
        for section in report.sections
    ]
    return templates.get_template("evaluation.md.jinja").render(
        report=report,
        sections=sections,
        names={section.name: _names(measure_tables(report, section)) for section in report.sections},
        facts=environment_facts(report.environment),
    )


def compared(report: EvaluationReport, section: SectionRow) -> tuple[Comparison, ...]:
    """The comparisons of a section, those left out that only qualify others."""
    return tuple(
        each for each in report.comparisons if each.section == section.name and each.name not in SECONDARY
    )


def agreed(report: EvaluationReport, section: SectionRow) -> tuple[Agreement, ...]:
    """How far the judges of a section agree."""
    return tuple(each for each in report.agreements if each.section == section.name)


def comparison_line(comparison: Comparison, prompts: int) -> str:
    """What a comparison supports, with its numbers.

    Args:
        comparison: of two models.
        prompts: how many its section has; said where the comparison rests on fewer.
    """
    judge = f" ({comparison.judge})" if comparison.judge else ""
    p_value = p_text(comparison.p_value)
    sign = "" if p_value.startswith("<") else "= "
    unit = " points" if comparison.test == "mcnemar" else ""
    pairs = pairs_text(comparison, prompts)
    return (
        f"{comparison.model}: {measure_label(comparison.name)}{judge} {finding_text(comparison)}, "
        f"{difference_text(comparison)}{unit} [{difference_bounds(comparison)}], p {sign}{p_value}"
        + (f", over {pairs}" if pairs else "")
    )


def agreement_line(agreement: Agreement) -> str:
    """How far two judges agree, with the number of answers."""
    return (
        f"{agreement.first} and {agreement.second} agree on {agreement.agreed} of {agreement.total} answers, "
        f"kappa {kappa_text(agreement.kappa)}"
    )


def _names(tables: Sequence[MeasureTable]) -> tuple[str, ...]:
    """What is measured by any judge, a column each."""
    return tuple(dict.fromkeys(name for table in tables for name in table.names))


def _rows(tables: Sequence[MeasureTable]) -> list[tuple[str, str, tuple[Measure | None, ...]]]:
    """Judge, model and the numbers, one row a judge and model."""
    names = _names(tables)
    found: list[tuple[str, str, tuple[Measure | None, ...]]] = []
    for table in tables:
        for model, numbers in table.rows:
            by_name = dict(zip(table.names, numbers, strict=True))
            found.append((table.judge or DASH, model, tuple(by_name.get(name) for name in names)))
    return found


def _section_table(tables: Sequence[MeasureTable]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False)
    judged = any(table.judge for table in tables)
    for name in ("judge", "model") if judged else ("model",):
        drawn.add_column(name, overflow="fold")
    for name in _names(tables):
        drawn.add_column(measure_label(name), no_wrap=True)
    for judge, model, numbers in _rows(tables):
        shown = [judge, model] if judged else [model]
        drawn.add_row(*map(Text, shown), *map(_two_lines, numbers))
    return drawn


def _two_lines(measure: Measure | None) -> Text:
    if measure is None:
        return Text(DASH)
    return Text.assemble(value_text(measure.estimate), "\n", (bounds_text(measure.estimate), "dim"))


def _cell(measure: Measure | None) -> str:
    return DASH if measure is None else f"{value_text(measure.estimate)} ({bounds_text(measure.estimate)})"
