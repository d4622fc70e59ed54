"""A bench as an HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaguard.reports.bench_chart import panel_svg, swatch_svg
from deltaguard.reports.bench_facts import run_facts
from deltaguard.reports.bench_view import bench_methods
from deltaguard.reports.bench_words import (
    ContestText,
    ScoreText,
    contest_legend,
    contest_line,
    contest_texts,
    finetune_facts,
    legend,
    panel_notes,
    preparation_line,
    score_texts,
)
from deltaguard.reports.page import Chart, render
from deltaguard.reports.records.bench import BenchReport, Contest, FinetuneRow, Score
from deltaguard.reports.text import capital


@dataclass(frozen=True)
class FinetuneView:
    """A fine-tune as the page shows it.

    Attributes:
        row: the fine-tune.
        facts: how it was trained, on what, and what it did.
        scores: of each method, with their words.
        contests: the method that keeps most beside each other, with their words.
        line: which of them it is told apart from.
    """

    row: FinetuneRow
    facts: str
    scores: Sequence[tuple[Score, ScoreText]]
    contests: Sequence[tuple[Contest, ContestText]]
    line: str


def bench_page(report: BenchReport) -> str:
    """The protocol's outcome: curves of all methods on each fine-tune, their scores, and every number.

    Args:
        report: of a finished bench.

    Returns:
        A complete HTML document.

    Example:
        ```python
        Path("report.html").write_text(bench_page(report), encoding="utf-8")
        ```
    """
    charts = [(row, _chart(report, row)) for row in report.finetunes]
    return render(
        "bench.html.jinja",
        report=report,
        swatches={name: swatch_svg(place) for place, name in enumerate(bench_methods(report))},
        charts=[chart for _, chart in charts if chart],
        undrawn=[(row.title, panel_notes(report, row)) for row, chart in charts if chart is None],
        legend=legend(report),
        contest_legend=contest_legend(report),
        preparation=preparation_line(report),
        finetunes=[_view(report, row) for row in report.finetunes],
        titles={row.name: row.title for row in report.finetunes},
        run=run_facts(report),
    )


def _chart(report: BenchReport, row: FinetuneRow) -> Chart | None:
    svg = panel_svg(report, row)
    if svg is None:
        return None
    texts = (text for _, text in score_texts(report, row))
    spoken = "; ".join(f"{text.method}: strength {text.strength}, kept {text.kept.value}" for text in texts)
    notes = map(capital, panel_notes(report, row))
    # The page breaks the lines of a note as they are.
    note = "\n".join((finetune_facts(report, row), *(f"{note}." for note in notes)))
    return Chart(capital(row.title), note, svg, f"Largest safe strengths. {spoken}.")


def _view(report: BenchReport, row: FinetuneRow) -> FinetuneView:
    return FinetuneView(
        row,
        finetune_facts(report, row),
        score_texts(report, row),
        contest_texts(report, row),
        contest_line(report, row),
    )
