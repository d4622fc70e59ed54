"""Scores of a bench as tables: for terminals, and as Markdown for the documentation."""

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deltaguard.reports.bench_words import (
    ContestText,
    NumberText,
    ScoreText,
    contest_legend,
    contest_line,
    contest_texts,
    finetune_facts,
    legend,
    preparation_line,
    score_texts,
)
from deltaguard.reports.records.bench import BenchReport, FinetuneRow
from deltaguard.reports.text import plain

_LESS = ("gain kept", "attack success", "false refusals")
_NUMBERS = ("attack success\nover aligned", "false refusals\nover aligned", "gain kept\n")


def bench_table(report: BenchReport) -> RenderableType:
    """The scores, a table a fine-tune.

    Args:
        report: of a finished bench.

    Returns:
        Something rich can print; made for 80 columns, numbers are never cut.

    Example:
        ```python
        Console(stderr=True).print(bench_table(report))
        ```
    """
    parts: list[RenderableType] = []
    for row in report.finetunes:
        parts += [
            Text(),
            _indented(Text(row.title, "bold")),
            _indented(Text(finetune_facts(report, row), "dim")),
            Text(),
            _terminal(text for _, text in score_texts(report, row)),
            *_contests(report, row),
        ]
    lines = _lines(report)
    return Group(*parts, *(Padding(Text(line, "dim"), (1, 0, 0, 1)) for line in lines))


def bench_markdown(report: BenchReport) -> str:
    """The scores as Markdown, a heading of the third level and a table a fine-tune, then what they mean.

    Args:
        report: of a finished bench.

    Returns:
        Markdown that ends with a line break; nothing in a name is read as markup.
    """
    sections = [
        f"### {plain(row.title)}\n\n{finetune_facts(report, row)}.\n\n{scores_markdown(report, row)}"
        f"{contests_markdown(report, row)}"
        for row in report.finetunes
    ]
    return "\n".join((*sections, *(f"{plain(line)}\n" for line in _lines(report))))


def scores_markdown(report: BenchReport, finetune: FinetuneRow) -> str:
    """The scores on one fine-tune as a Markdown table.

    Args:
        report: of a finished bench.
        finetune: one of its rows.

    Returns:
        The lines of the table, each with its line break.
    """
    rates = "attack success over aligned (95 %) | false refusals over aligned (95 %)"
    rows = [
        f"| method | strength | {rates} | gain kept (95 %) | told apart | request |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for _, text in score_texts(report, finetune):
        numbers = map(_in_one_line, (text.points, text.false_refusal, text.kept))
        cells = (f"`{plain(text.method)}`", text.strength, *numbers, text.told_apart, text.request)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def contests_markdown(report: BenchReport, finetune: FinetuneRow) -> str:
    """The method that keeps most beside each other, as a line and a Markdown table.

    Args:
        report: of a finished bench.
        finetune: one of its rows.

    Returns:
        The lines, each with its line break, an empty one first; nothing where no two methods compare.
    """
    told = contest_texts(report, finetune)
    if not told:
        return ""
    head = " | ".join(f"{name} (95 %)" for name in _LESS)
    rows = [
        f"| `{plain(told[0][0].leader)}` less | {head} | told apart |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for _, text in told:
        numbers = map(_in_one_line, (text.kept, text.points, text.false_refusal))
        rows.append(f"| {' | '.join((f'`{plain(text.other)}`', *numbers, text.told_apart))} |")
    return f"\n{plain(contest_line(report, finetune))}\n\n" + "\n".join(rows) + "\n"


def _lines(report: BenchReport) -> list[str]:
    """What stands below the tables."""
    return [line for line in (legend(report), contest_legend(report), preparation_line(report)) if line]


def _contests(report: BenchReport, finetune: FinetuneRow) -> tuple[RenderableType, ...]:
    texts = [text for _, text in contest_texts(report, finetune)]
    line = contest_line(report, finetune)
    return (Padding(Text(line), (1, 0, 1, 1)), _less(texts)) if texts else ()


def _less(texts: Iterable[ContestText]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(_two_lines("less", "told apart"), overflow="fold")
    for name in _LESS:
        table.add_column(name, justify="right", no_wrap=True)
    for text in texts:
        numbers = (text.kept, text.points, text.false_refusal)
        table.add_row(
            _two_lines(text.other, text.told_apart),
            *(_two_lines(number.value, number.interval) for number in numbers),
        )
    return table


def _terminal(texts: Iterable[ScoreText]) -> Table:
    """Two lines a method: what stands small below the other is named below it in the head."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(_two_lines("method", "request"), overflow="fold")
    table.add_column(_two_lines("strength", "told apart"), justify="right", no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for text in texts:
        numbers = (text.points, text.false_refusal, text.kept)
        table.add_row(
            _two_lines(text.method, text.request),
            _two_lines(text.strength, text.told_apart),
            *(_two_lines(number.value, number.interval) for number in numbers),
        )
    return table


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 1))


def _two_lines(above: str, below: str) -> Text:
    return Text.assemble(above, "\n", (below, "dim")) if below else Text(above)


def _in_one_line(number: NumberText) -> str:
    return f"{number.value} ({number.interval})" if number.interval else number.value
