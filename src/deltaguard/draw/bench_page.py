"""A bench as an HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaguard.draw.bench_chart import panel_svg, swatch_svg
from deltaguard.draw.bench_tables import ScoreText, finetune_facts, legend, score_text
from deltaguard.draw.bench_view import bench_methods, scores_of
from deltaguard.draw.facts import Facts, environment_facts, times
from deltaguard.draw.page import Chart, render
from deltaguard.draw.text import capital, short_reference
from deltaguard.report.bench import BenchReport, FinetuneRow, Score


@dataclass(frozen=True)
class FinetuneView:
    """A fine-tune as the page shows it.

    Attributes:
        row: the fine-tune.
        facts: how it was trained, on what, and what it did.
    """

    row: FinetuneRow
    facts: str


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
    charts = [_chart(report, row) for row in report.finetunes]
    return render(
        "bench.html.jinja",
        report=report,
        swatches={name: swatch_svg(place) for place, name in enumerate(bench_methods(report))},
        charts=[chart for chart in charts if chart],
        legend=legend(report),
        scored=[_scores(report, row) for row in report.finetunes],
        titles={row.name: row.title for row in report.finetunes},
        run=_run_facts(report),
    )


def _chart(report: BenchReport, row: FinetuneRow) -> Chart | None:
    svg = panel_svg(report, row)
    if svg is None:
        return None
    texts = map(score_text, scores_of(report, row))
    spoken = "; ".join(f"{text.method}: strength {text.strength}, kept {text.kept}" for text in texts)
    return Chart(capital(row.title), finetune_facts(report, row), svg, f"Largest safe strengths. {spoken}.")


def _scores(report: BenchReport, row: FinetuneRow) -> tuple[FinetuneView, Sequence[tuple[Score, ScoreText]]]:
    scores = [(score, score_text(score)) for score in scores_of(report, row)]
    return FinetuneView(row, finetune_facts(report, row)), scores


def _run_facts(report: BenchReport) -> Facts:
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.settings.items())
    return (
        *environment_facts(report.environment),
        ("command", report.command),
        ("aligned model", short_reference(report.aligned)),
        ("seeds", ", ".join(map(str, report.seeds))),
        ("settings", settings),
        ("time by stage", times(report.seconds)),
    )
