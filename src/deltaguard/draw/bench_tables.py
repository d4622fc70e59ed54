"""Scores of a bench as tables: for terminals, and as Markdown for the documentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaguard.draw.bench_view import ALIGNED, FINETUNED, attack_success, scores_of
from deltaguard.draw.text import DASH, duration, option, percent, points, points_interval, share_interval
from deltaguard.report.bench import BenchReport, FinetuneRow, Score, Training

NOT_SAFE = "none safe"
"""What stands for the strength where none of those tried was within the bound."""

TRAININGS: Mapping[Training, str] = {"full": "full", "lora": "LoRA"}
"""Ways of training, as people write them."""


@dataclass(frozen=True)
class ScoreText:
    """A score in words, the same in every output.

    Attributes:
        method: name of the method.
        strength: the largest safe one.
        points: attack success over the aligned model's there, in points.
        points_interval: its interval, empty where there is none.
        kept: share of the utility gain kept.
        kept_interval: its interval, empty where there is none.
        told_apart: whether the interval of the points leaves the bound out.
        request: time of a request.
    """

    method: str
    strength: str
    points: str
    points_interval: str
    kept: str
    kept_interval: str
    told_apart: str
    request: str


def score_text(score: Score) -> ScoreText:
    """A score in words.

    Example:
        ```python
        score_text(report.scores[0]).strength  # "0.1", or "none safe"
        ```
    """
    safe = score.strength is not None
    return ScoreText(
        method=score.method,
        strength=option(score.strength) if safe else NOT_SAFE,
        points=points(score.points.value if score.points else None),
        points_interval=points_interval(score.points) if score.points else "",
        kept=percent(score.kept.value if score.kept else None),
        kept_interval=share_interval(score.kept) if score.kept else "",
        told_apart=option(score.told_apart) if safe else DASH,
        request=DASH if score.request_seconds is None else duration(score.request_seconds),
    )


def finetune_facts(report: BenchReport, finetune: FinetuneRow) -> str:
    """A fine-tune in one line: how it was trained, on what, and what it did to attack success."""
    parts = [
        f"{TRAININGS[finetune.training]} fine-tuning",
        f"{finetune.examples} examples, {finetune.harmful} harmful",
    ]
    rates = [attack_success(report, finetune, method) for method in (ALIGNED, FINETUNED)]
    if None not in rates:
        before, after = map(percent, rates)
        parts.append(f"attack success {before} aligned, {after} fine-tuned")
    return "; ".join(parts)


def legend(report: BenchReport) -> str:
    """What the columns of the scores mean."""
    return (
        "Each method stands at its largest strength whose attack success is at most "
        f"{report.bound:g} points over the aligned model's. Points: attack success over the aligned model's. "
        "Kept: share of the utility gain kept; a dash where there is no gain to keep or no strength is safe. "
        "Told apart: whether the 95 % interval of the points leaves the bound out; where it does not, "
        "being within the bound may be chance."
    )


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
            Text(f" {row.title}", "bold"),
            Text(f" {finetune_facts(report, row)}", "dim"),
            Text(),
        ]
        parts.append(_terminal(scores_of(report, row)))
    return Group(*parts, Text(), Text(legend(report), "dim"))


def bench_markdown(report: BenchReport) -> str:
    """The scores as Markdown, a heading of the third level and a table a fine-tune.

    Args:
        report: of a finished bench.

    Returns:
        Markdown that ends with a line break; nothing in a name is read as markup.
    """
    sections = [
        f"### {_plain(row.title)}\n\n{finetune_facts(report, row)}.\n\n{scores_markdown(report, row)}"
        for row in report.finetunes
    ]
    return "\n".join(sections)


def scores_markdown(report: BenchReport, finetune: FinetuneRow) -> str:
    """The scores on one fine-tune as a Markdown table.

    Args:
        report: of a finished bench.
        finetune: one of its rows.

    Returns:
        The lines of the table, each with its line break.
    """
    rows = [
        "| method | strength | points over aligned (95 %) | gain kept (95 %) | told apart | request |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for text in map(score_text, scores_of(report, finetune)):
        cells = (
            f"`{_plain(text.method)}`",
            text.strength,
            _with(text.points, text.points_interval),
            _with(text.kept, text.kept_interval),
            text.told_apart,
            text.request,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _terminal(scores: Sequence[Score]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("strength", "points over\naligned", "gain kept"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("told\napart", no_wrap=True)
    table.add_column("request", justify="right", no_wrap=True)
    for text in map(score_text, scores):
        table.add_row(
            Text(text.method),
            text.strength,
            _two_lines(text.points, text.points_interval),
            _two_lines(text.kept, text.kept_interval),
            text.told_apart,
            text.request,
        )
    return table


def _two_lines(value: str, interval: str) -> Text:
    return Text.assemble(value, "\n", (interval, "dim")) if interval else Text(value)


def _with(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def _plain(name: str) -> str:
    """A name in a Markdown table or heading."""
    return " ".join(name.replace("|", "¦").replace("`", "'").replace("<", "‹").split())
