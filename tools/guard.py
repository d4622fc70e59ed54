"""The table of what limits of safety KL leave and keep, from what `benchmarks.guard` writes."""

from collections.abc import Sequence
from statistics import mean

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.attacks import AttackOutcome, Rates
from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import DASH, percent
from tools.tables import made_with, small


class Guards(BaseModel):
    """`docs/results/guard.json`.

    Attributes:
        environment: versions, machine and time.
        command: what produced it.
        titles: of each fine-tune, by its name.
        seeds: of the fine-tunes.
        outcomes: of every fine-tune, seed and limit; the method of each is its limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    command: str
    titles: dict[str, str]
    seeds: tuple[int, ...]
    outcomes: tuple[AttackOutcome, ...]


def guard_table(content: str) -> str:
    """Draw a row for each fine-tune and limit, with what every seed gave.

    Args:
        content: a `Guards` as JSON.

    Returns:
        Markdown.
    """
    found = Guards.model_validate_json(content)
    rows: dict[tuple[str, str], list[AttackOutcome]] = {}
    for outcome in found.outcomes:
        rows.setdefault((outcome.attacker, outcome.method), []).append(outcome)
    drawn = Table.of(
        "",
        list(rows.values()),
        (
            (Column("fine-tune", "name", code=True), lambda row: row[0].attacker),
            ("safety KL\nat most", lambda row: row[0].method),
            ("plainly", lambda row: _points([each.plain for each in row])),
            ("in the attacker's way", lambda row: _points([each.wrapped for each in row])),
            ("of what the attack added,\nleft", _left),
            ("gain kept,\nlikelihood", _kept),
        ),
    ).markdown()
    seeds = ", ".join(map(str, found.seeds))
    fine_tunes = "; ".join(f"`{name}`: {title}" for name, title in found.titles.items())
    how = (
        f"Points of attack success over the aligned model, a mean over seeds, and of each seed ({seeds}); "
        f"{found.outcomes[0].plain.aligned.total} harmful requests, asked plainly and in the attacker's way; "
        f"restored to a limit on safety KL alone. {fine_tunes}. `{found.command}`; "
        f"{made_with(found.environment)}"
    )
    return f"{drawn}\n\n{small(how)}"


def _points(rates: Sequence[Rates | None]) -> str:
    points = [each.over_aligned.value for each in rates if each is not None]
    each = ", ".join(f"{point:+.1f}" for point in points)
    return f"{mean(points):+.1f} ({each})" if points else DASH


def _left(row: Sequence[AttackOutcome]) -> str:
    """Find the share that is left of what fine-tuning added, in the way in which it added most."""
    ways = [max((each.plain, each.wrapped or each.plain), key=_added) for each in row]
    shares = [rates.over_aligned.value / 100 / _added(rates) for rates in ways if _added(rates) > 0]
    return percent(mean(shares)) if shares else DASH


def _added(rates: Rates) -> float:
    return rates.finetuned.value - rates.aligned.value


def _kept(row: Sequence[AttackOutcome]) -> str:
    shares = [each.kept.value for each in row if each.kept is not None]
    return percent(mean(shares)) if shares else DASH
