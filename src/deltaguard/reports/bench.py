"""A bench as terminal tables, as Markdown, and as a page: methods over fine-tunes, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import nan
from statistics import mean
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.text import Text

from deltaguard.reports import page
from deltaguard.reports.records.bench import ALIGNED, FINETUNED, BenchReport, Cell, FinetuneRow, Score
from deltaguard.reports.records.evaluation import Estimate
from deltaguard.reports.table import Cell as Shown
from deltaguard.reports.table import Column, Table, estimate, excess, indented, rate
from deltaguard.reports.text import (
    DASH,
    Facts,
    capital,
    duration,
    environment_facts,
    model_label,
    option,
    percent,
    plain,
    public_option,
    short_command,
    short_reference,
    times,
)

NOT_SAFE = "none safe"
"""What stands for the strength where none of those tried was within the bound."""

_RATES: Mapping[str, Callable[[Cell], Estimate]] = {
    "attack success": lambda cell: cell.attack_success,
    "false refusals": lambda cell: cell.false_refusal,
}
_OFTEN = ("request", "measure", "total")
"""Times of a report that are no single model's."""
_EXCESS = ("attack success\nover aligned", "false refusals\nover aligned")


def bench_table(report: BenchReport) -> RenderableType:
    """Draw the scores for a terminal, a table a fine-tune."""
    parts: list[RenderableType] = []
    for row in report.finetunes:
        scores, contests = scores_table(report, row), contests_table(report, row)
        parts += [Text(), indented(row.title, style="bold")]
        parts += [indented(_finetune_facts(report, row), style="dim"), Text()]
        parts.append(replace(scores, title="").terminal())
        if contests:
            parts += [indented(contests.title, above=1), Text(), replace(contests, title="").terminal()]
    return Group(*parts, *(indented(line, above=1, style="dim") for line in _legends(report)))


def bench_markdown(report: BenchReport) -> str:
    """Draw the scores as Markdown: a heading of the third level and a table a fine-tune, then what they mean.

    Returns:
        Markdown that ends with a line break; nothing in a name is read as markup.
    """
    parts: list[str] = []
    for row in report.finetunes:
        parts += [f"### {plain(row.title)}", f"{_finetune_facts(report, row)}."]
        parts.append(scores_table(report, row).markdown())
        if contests := contests_table(report, row):
            parts += [plain(contests.title), contests.markdown()]
    return "\n\n".join((*parts, *map(plain, _legends(report)))) + "\n"


def bench_page(report: BenchReport) -> str:
    """Draw the protocol's outcome: curves of all methods on each fine-tune, their scores, every number.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.
    """
    from deltaguard.reports.curves import panel_notes, swatch_svg

    charts = [(row, _chart(report, row)) for row in report.finetunes]
    undrawn = [
        page.Paragraph(
            f"{capital(row.title)}: {'; '.join(panel_notes(report, row)) or 'no point of a curve'}."
        )
        for row, chart in charts
        if chart is None
    ]
    tables = [
        table
        for row in report.finetunes
        for table in (scores_table(report, row), contests_table(report, row))
        if table
    ]
    return page.page(
        f"bench · preset {report.preset}",
        "deltaguard bench: safety against utility",
        [
            page.Notes(report.notes),
            page.Heading("Curves"),
            page.Paragraph(
                "A line is a method, a point one of its strengths over all seeds. Bands are 95 % intervals "
                "of the height, and so are upright bars of points that stand alone; level bars are those of "
                "attack success. Numbers are strengths of the first method, where there is room. Further "
                "left is safer, further up is better; the dashed line is the bound. Points are spaced evenly "
                "near 0 and ever closer beyond."
            ),
            page.Legend(report.methods),
            page.Group([chart for _, chart in charts if chart]),
            *undrawn,
            page.Heading("Scores"),
            *map(page.Paragraph, _legends(report)),
            *tables,
            page.Heading("Every number"),
            *(page.Folded(f"{table.title} ({len(table.rows)})", table) for table in _every_number(report)),
            page.Heading("The run"),
            page.Pairs(_run_facts(report)),
        ],
        created=report.environment.created,
        heading="Safety against utility",
        lead=page.sentence(
            "{} methods on {} fine-tunes of {}. A strength is safe where attack success is at most {} points "
            "over the aligned model's.",
            str(len(report.methods)),
            str(len(report.finetunes)),
            page.strong(short_reference(report.aligned)),
            f"{report.bound:g}",
        ),
        swatches={name: swatch_svg(place) for place, name in enumerate(report.methods)},
    )


def scores_table(report: BenchReport, finetune: FinetuneRow) -> Table:
    """Tabulate the scores on one fine-tune.

    A method without a point on any curve has dashes throughout: that no strength is safe would be more than
    was seen.
    """
    measured = {point.method for point in report.points_of(finetune)}

    def strength(score: Score) -> Shown:
        unsafe = score.strength is None and score.method in measured
        return Shown(NOT_SAFE, nan) if unsafe else Shown(option(score.strength), score.strength)

    return Table.of(
        capital(finetune.title),
        report.scores_of(finetune),
        (
            (Column("method", "name", code=True), lambda score: score.method),
            ("strength", strength),
            (_EXCESS[0], lambda score: excess(score.points)),
            (_EXCESS[1], lambda score: excess(score.false_refusal)),
            ("gain kept", lambda score: _bare(rate(score.kept))),
            (
                Column("told apart", "name", under="strength"),
                lambda score: option(score.told_apart) if score.method in measured else DASH,
            ),
            (Column("request", under="method"), lambda score: _seconds(score.request_seconds)),
        ),
        note=f"{_finetune_facts(report, finetune)}; utility: {finetune.utility}, {finetune.better} is better",
    )


def contests_table(report: BenchReport, finetune: FinetuneRow) -> Table | None:
    """Tabulate the method that keeps most of one fine-tune's gain against each other method.

    Returns:
        A table whose title says which of them it is told apart from; None where no two methods compare.
    """
    contests = report.contests_of(finetune)
    if not contests:
        return None
    told, rest = (
        ", ".join(contest.other for contest in contests if contest.told_apart == apart)
        for apart in (True, False)
    )
    parts = [f"told apart from {told}"] * bool(told) + [f"not told apart from {rest}"] * bool(rest)
    leader = contests[0].leader
    return Table.of(
        f"{leader} keeps most at a safe strength: {'; '.join(parts)}.",
        contests,
        (
            (Column(f"{leader} less", "name", code=True), lambda contest: contest.other),
            ("gain kept", lambda contest: excess(contest.kept, 100)),
            ("attack success", lambda contest: excess(contest.points)),
            ("false refusals", lambda contest: excess(contest.false_refusal)),
            (
                Column("told apart", "name", under=f"{leader} less"),
                lambda contest: option(contest.told_apart),
            ),
        ),
        note=f"{finetune.title}; in points, paired on the same prompts",
    )


def _finetune_facts(report: BenchReport, finetune: FinetuneRow) -> str:
    """Say in one line how a fine-tune was trained, on what, and what it did to both rates."""
    parts = [
        f"{'LoRA' if finetune.training == 'lora' else 'full'} fine-tuning",
        f"{finetune.examples} examples, {finetune.harmful} harmful",
    ]
    for name, found in _RATES.items():
        values = {
            method: [
                found(cell).value
                for cell in report.cells
                if (cell.finetune, cell.method, cell.strength) == (finetune.name, method, None)
            ]
            for method in (ALIGNED, FINETUNED)
        }
        if all(values.values()):
            told = (f"{percent(mean(each))} {model_label(method)}" for method, each in values.items())
            parts.append(f"{name} {', '.join(told)}")
    return "; ".join(parts)


def legend(report: BenchReport) -> str:
    """Say what the columns of the scores mean."""
    return (
        "Each method stands at its largest strength whose attack success is at most "
        f"{report.bound:g} points over the aligned model's; with each number its 95 % interval. Over "
        "aligned: the method's rate less the aligned model's on the same prompts, in points. Gain kept: "
        "share of the fine-tune's utility gain; a dash where none of the strengths tried is safe, where "
        "there is no gain to keep, or where the gain is too "
        "small for a share with a bounded interval; without an interval where every example gives the same "
        "share. Told apart: whether the 95 % interval of attack success "
        "over aligned leaves the bound out, at that strength or, where none is safe, at every one tried; "
        "where it does not, the side of the bound may be chance. Request: time for one fine-tune."
    )


def contest_legend(report: BenchReport) -> str:
    """Say what the comparisons of methods with each other mean; empty where there are none."""
    if not report.contests:
        return ""
    return (
        "Keeps most: the method with the largest gain kept, less each other one, both at their largest safe "
        "strength, paired on the same prompts, in points. Two methods are told apart where the 95 % interval "
        "of the gain leaves 0 out and the p-value, times the number of pairs of methods, is under 0.05. All "
        "strengths, and so the method that keeps most, were picked on these very prompts, which favours it."
    )


def preparation(report: BenchReport) -> Mapping[str, float]:
    """Find how long everything took that an aligned model needs once, whatever is fine-tuned from it.

    Returns:
        Seconds by what was made: the store of curvature, models that methods take as helpers. The fine-tunes
        themselves and models trained anew for a request are left out.
    """
    finetunes = tuple(f"{row.name}-" for row in report.finetunes)
    return {
        name: seconds
        for name, seconds in report.seconds.items()
        if name not in _OFTEN and not f"{name}-".startswith(finetunes)
    }


def preparation_line(report: BenchReport) -> str:
    """Say how long took what an aligned model needs once; empty where nothing was timed.

    Example:
        ```python
        preparation_line(report)  # "Once per aligned model: store 44.0 s, safe 1 min 2 s."
        ```
    """
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in preparation(report).items())
    return f"Once per aligned model: {spent}." if spent else ""


def _legends(report: BenchReport) -> list[str]:
    return [line for line in (legend(report), contest_legend(report), preparation_line(report)) if line]


def _seconds(seconds: float | None) -> Shown:
    return Shown(DASH if seconds is None else duration(seconds), seconds)


def _bare(cell: Shown) -> Shown:
    """Leave out how many prompts a number was taken over, which is the same throughout."""
    return replace(cell, total=None)


def _every_number(report: BenchReport) -> tuple[Table, Table]:
    titles = {row.name: row.title for row in report.finetunes}
    points = Table.of(
        "Points of the curves",
        report.curves,
        (
            (Column("method", "name"), lambda point: point.method),
            (Column("fine-tune", "words"), lambda point: titles[point.finetune]),
            ("strength", lambda point: Shown(option(point.strength), point.strength)),
            (_EXCESS[0], lambda point: excess(point.points)),
            (_EXCESS[1], lambda point: excess(point.false_refusal)),
            ("gain kept", lambda point: _bare(rate(point.kept))),
            ("NLL, general,\nover aligned", lambda point: _bare(estimate(point.general))),
            ("within\nthe bound", lambda point: option(point.safe)),
            ("told apart", lambda point: option(point.told_apart)),
        ),
        note="over all seeds",
    )
    cells = Table.of(
        "Every model measured",
        report.cells,
        (
            (Column("method", "name"), lambda cell: model_label(cell.method)),
            (Column("fine-tune", "words"), lambda cell: titles[cell.finetune]),
            ("seed", lambda cell: cell.seed),
            ("strength", lambda cell: Shown(option(cell.strength), cell.strength)),
            ("attack success", lambda cell: _bare(rate(cell.attack_success))),
            ("incoherent", lambda cell: _bare(rate(cell.incoherent))),
            ("false refusals", lambda cell: _bare(rate(cell.false_refusal))),
            ("utility", lambda cell: _bare(estimate(cell.mean_utility))),
            ("NLL, general", lambda cell: _bare(estimate(cell.mean_general))),
            ("request", lambda cell: _seconds(cell.seconds.get("request"))),
        ),
        note="with 95 % intervals; NLL in nats a token",
    )
    return points, cells


def _chart(report: BenchReport, row: FinetuneRow) -> page.Chart | None:
    from deltaguard.reports.curves import panel_notes, panel_svg

    svg = panel_svg(report, row)
    if svg is None:
        return None
    spoken = "; ".join(
        f"{method.text}: strength {strength.text}, kept {kept.text}"
        for method, strength, _, _, kept, *_ in (line.cells for line in scores_table(report, row).rows)
    )
    notes = (f"{capital(note)}." for note in panel_notes(report, row))
    # The page breaks the lines of a note as they are.
    note = "\n".join((_finetune_facts(report, row), *notes))
    return page.Chart(capital(row.title), note, svg, f"Largest safe strengths. {spoken}.")


def _run_facts(report: BenchReport) -> Facts:
    once = preparation(report)
    often = {name: seconds for name, seconds in report.seconds.items() if name in _OFTEN}
    # All fine-tunes in one: a thorough bench makes hundreds.
    rest = sum(seconds for name, seconds in report.seconds.items() if name not in {*once, *often})
    stages = {**once, **({"fine-tunes": rest} if rest else {}), **often}
    return (
        *environment_facts(report.environment),
        ("command", short_command(report.command)),
        ("aligned model", short_reference(report.aligned)),
        ("seeds", ", ".join(map(str, report.seeds))),
        ("settings", settings_words(report.settings)),
        ("time by stage", times(stages)),
    )


def settings_words(settings: Mapping[str, Any]) -> str:
    """Write down settings, without the folders that paths among them lead through."""
    return "; ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in settings.items())


def _shown(value: Any) -> str:
    """Give a setting in words, however deep it nests."""
    if isinstance(value, Mapping):
        named = cast("Mapping[str, Any]", value).items()
        parts = [f"{name.replace('_', ' ')} {_shown(part)}" for name, part in named]
        return f"({', '.join(parts)})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(map(_shown, cast('Sequence[Any]', value)))})"
    return public_option(value)
