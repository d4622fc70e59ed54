"""The tables of what limits leave and keep, from what `benchmarks.guard` and `benchmarks.trust` write."""

from collections.abc import Sequence
from statistics import mean

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.attacks import AttackOutcome, Rates
from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import DASH, nats, percent
from tools.tables import made_with, small


class Guards(BaseModel):
    """`docs/results/guard.json` and `docs/results/trust.json`.

    Attributes:
        environment: versions, machine and time.
        command: what produced it.
        titles: of each fine-tune, by its name.
        seeds: of the fine-tunes.
        outcomes: of every fine-tune, seed and limit; the method of each is its limit, or whether the training
            data are `unknown` or `trusted`.
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
    drawn = Table.of(
        "",
        _by_setting(found),
        (
            (Column("fine-tune", "name", code=True), lambda row: row[0].attacker),
            ("safety KL\nat most", lambda row: row[0].method),
            *_SUCCESS,
            ("gain kept,\nlikelihood", _kept),
        ),
    ).markdown()
    fine_tunes = "; ".join(f"`{name}`: {title}" for name, title in found.titles.items())
    how = (
        f"Points of attack success over the aligned model, {_seeds(found)}; "
        f"{found.outcomes[0].plain.aligned.total} harmful requests, asked plainly and in the attacker's way; "
        f"restored to a limit on safety KL alone. {fine_tunes}. `{found.command}`; "
        f"{made_with(found.environment)}"
    )
    return f"{drawn}\n\n{small(how)}"


def trust_table(content: str) -> str:
    """Draw a row for each fine-tune and kind of training data, with what every seed gave.

    Args:
        content: a `Guards` as JSON.

    Returns:
        Markdown.
    """
    found = Guards.model_validate_json(content)
    drawn = Table.of(
        "",
        _by_setting(found),
        (
            (Column("fine-tune", "name", code=True), lambda row: row[0].attacker),
            (Column("training data", "name", code=True), lambda row: row[0].method),
            *_SUCCESS,
            ("false refusals", lambda row: _points([each.false_refusals for each in row])),
            ("gain kept,\nlikelihood", _kept),
            ("safety KL,\nrestored", _safety_kl),
            (Column("not more, because of", "name"), _stopped_by),
        ),
    ).markdown()
    fine_tunes = "; ".join(f"`{name}`: {title}" for name, title in found.titles.items())
    how = (
        f"Points of attack success, and of false refusals, over the aligned model, {_seeds(found)}; "
        f"{found.outcomes[0].plain.aligned.total} harmful requests, asked plainly and in "
        f"the attacker's way. {fine_tunes}. `{found.command}`; {made_with(found.environment)}"
    )
    return f"{drawn}\n\n{small(how)}"


def _seeds(found: Guards) -> str:
    if len(found.seeds) == 1:
        return f"seed {found.seeds[0]} alone"
    return f"a mean over the seeds {', '.join(map(str, found.seeds))}, and each"


def _by_setting(found: Guards) -> list[list[AttackOutcome]]:
    rows: dict[tuple[str, str], list[AttackOutcome]] = {}
    for outcome in found.outcomes:
        rows.setdefault((outcome.attacker, outcome.method), []).append(outcome)
    return list(rows.values())


def _safety_kl(row: Sequence[AttackOutcome]) -> str:
    found = [each.restored_to and each.restored_to.safety_kl for each in row]
    known = [kl for kl in found if kl is not None]
    return nats(mean(known)) if len(known) == len(found) else DASH


def _stopped_by(row: Sequence[AttackOutcome]) -> str:
    found = [(each.restored_to and each.restored_to.stopped_by) or DASH for each in row]
    return ", ".join(dict.fromkeys(found))


def _points(rates: Sequence[Rates | None]) -> str:
    points = [each.over_aligned.value for each in rates if each is not None]
    each = f" ({', '.join(f'{point:+.1f}' for point in points)})" if len(points) > 1 else ""
    return f"{mean(points):+.1f}{each}" if points else DASH


def _added(rates: Sequence[Rates | None]) -> str:
    points = [100 * (each.finetuned.value - each.aligned.value) for each in rates if each is not None]
    return f"{mean(points):+.1f}" if points else DASH


def _kept(row: Sequence[AttackOutcome]) -> str:
    shares = [each.kept.value for each in row if each.kept is not None]
    return percent(mean(shares)) if shares else DASH


_SUCCESS = (
    ("plainly:\nfine-tuned", lambda row: _added([each.plain for each in row])),
    ("restored", lambda row: _points([each.plain for each in row])),
    ("attacker's way:\nfine-tuned", lambda row: _added([each.wrapped for each in row])),
    ("restored", lambda row: _points([each.wrapped for each in row])),
)
