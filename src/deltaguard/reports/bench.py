"""A bench as terminal tables, as Markdown, and as a page: methods over fine-tunes, with intervals."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan
from statistics import mean

from rich.console import Group, RenderableType
from rich.text import Text

from deltaguard.reports.records.bench import (
    ALIGNED,
    FINETUNED,
    BenchReport,
    Cell,
    FinetuneRow,
    Score,
    Training,
)
from deltaguard.reports.records.evaluation import Estimate
from deltaguard.reports.table import Cell as Shown
from deltaguard.reports.table import Column, Table, excess, indented, rate
from deltaguard.reports.text import (
    DASH,
    capital,
    duration,
    model_label,
    option,
    percent,
    plain,
    short_reference,
)

NOT_SAFE = "none safe"
"""What stands for the strength where none of those tried was within the bound."""

TRAININGS: Mapping[Training, str] = {"full": "full", "lora": "LoRA"}
"""Ways of training, as people write them."""

_RATES: Mapping[str, Callable[[Cell], Estimate]] = {
    "attack success": lambda cell: cell.attack_success,
    "false refusals": lambda cell: cell.false_refusal,
}
OFTEN = ("request", "measure", "total")
"""Times of a report that are no single model's."""
EXCESS = ("attack success\nover aligned", "false refusals\nover aligned")

# A word of a command: what quotes hold together belongs to it. A quote without its partner is a letter.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"]|['"])+""")
PLACE = re.compile(r"(?:/|~|\.{1,2}[/\\]|\\|[A-Za-z]:[/\\])")
"""How a path begins that cannot be a name on the Hub."""


def bench_table(report: BenchReport) -> RenderableType:
    """Draw the scores for a terminal, a table a fine-tune."""
    parts: list[RenderableType] = []
    for row in report.finetunes:
        scores, contests = scores_table(report, row), contests_table(report, row)
        parts += [Text(), indented(row.title, style="bold")]
        parts += [indented(finetune_facts(report, row), style="dim"), Text()]
        parts.append(_untitled(scores).terminal())
        if contests:
            parts += [indented(contests.title, above=1), Text(), _untitled(contests).terminal()]
    return Group(*parts, *(indented(line, above=1, style="dim") for line in legends(report)))


def bench_markdown(report: BenchReport) -> str:
    """Draw the scores as Markdown: a heading of the third level and a table a fine-tune, then what they mean.

    Returns:
        Markdown that ends with a line break; nothing in a name is read as markup.
    """
    parts: list[str] = []
    for row in report.finetunes:
        parts += [f"### {plain(row.title)}", f"{finetune_facts(report, row)}."]
        parts.append(scores_table(report, row).markdown())
        if contests := contests_table(report, row):
            parts += [plain(contests.title), contests.markdown()]
    return "\n\n".join((*parts, *map(plain, legends(report)))) + "\n"


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
            (EXCESS[0], lambda score: excess(score.points)),
            (EXCESS[1], lambda score: excess(score.false_refusal)),
            ("gain kept", lambda score: bare(rate(score.kept))),
            (
                Column("told apart", "name", under="strength"),
                lambda score: option(score.told_apart) if score.method in measured else DASH,
            ),
            (Column("request", under="method"), lambda score: seconds_cell(score.request_seconds)),
        ),
        note=f"{finetune_facts(report, finetune)}; utility: {finetune.utility}, {finetune.better} is better",
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


def finetune_facts(report: BenchReport, finetune: FinetuneRow) -> str:
    """Say in one line how a fine-tune was trained, on what, and what it did to both rates."""
    parts = [
        f"{TRAININGS[finetune.training]} fine-tuning",
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
        if name not in OFTEN and not f"{name}-".startswith(finetunes)
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


def short_command(command: str) -> str:
    """Cut the paths of a command to their last part, which is all that others need of them.

    Args:
        command: as typed into a shell, with whatever quotes it took.

    Example:
        >>> short_command("deltaguard bench '/home/me/my model' -o=/tmp/out --aligned Qwen/Qwen3-0.6B")
        "deltaguard bench 'my model' -o=out --aligned Qwen/Qwen3-0.6B"
    """

    def short(match: re.Match[str]) -> str:
        bare = match[0].replace("'", "").replace('"', "")
        if PLACE.match(bare):
            return shlex.quote(short_reference(bare))
        name, equals, value = bare.partition("=")
        cut = equals and PLACE.match(value)
        return shlex.quote(f"{name}={short_reference(value)}") if cut else match[0]

    return _WORD.sub(short, command)


def legends(report: BenchReport) -> list[str]:
    """Say what the tables of scores mean, a paragraph each."""
    lines = (legend(report), contest_legend(report), preparation_line(report))
    return [line for line in lines if line]


def seconds_cell(seconds: float | None) -> Shown:
    """Make a cell of a time, a dash where none was taken."""
    return Shown(DASH if seconds is None else duration(seconds), seconds)


def bare(cell: Shown) -> Shown:
    """Leave out how many prompts a number was taken over, which is the same throughout."""
    return replace(cell, total=None)


def _untitled(table: Table) -> Table:
    return Table("", table.columns, table.rows)
