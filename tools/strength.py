"""Tables of what methods keep at which strength, from `docs/results/strength.json`."""

from collections.abc import Iterable
from itertools import groupby

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment, RateRow
from deltaguard.reports.table import Column, Table, rate
from deltaguard.reports.text import Measured, interval, percent
from tools.tables import made_with, small


class StrengthRow(BaseModel):
    """One restore of one fine-tune, measured.

    Attributes:
        finetune: the fine-tune in a few words, such as "tickets with 9 % harmful".
        seed: of the fine-tune.
        method: the solver.
        budget: how the strength is read, null where the method has one way only.
        compensation: null where the method has one way only.
        strength: as given.
        attack_success: of the restored model.
        aligned_attack_success: of the aligned model, the same in all rows of a fine-tune.
        finetuned_attack_success: of the fine-tuned model, the same in all rows of a fine-tune.
        task_accuracy: of the restored model.
        kept_gain: (restored - aligned) / (finetuned - aligned) of the task accuracy.
        safety_cost: see `RestoreReport`; null where no curvature is known.
        kept_energy: see `RestoreReport`; null in rows of before it was known.
        kept_entries: see `RestoreReport`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    finetune: str
    seed: int
    method: str
    budget: str | None = None
    compensation: str | None = None
    strength: float
    attack_success: RateRow
    aligned_attack_success: RateRow
    finetuned_attack_success: RateRow
    task_accuracy: RateRow
    kept_gain: float | None
    safety_cost: float | None
    kept_energy: float | None = None
    kept_entries: float | None = None


class Strengths(BaseModel):
    """`docs/results/strength.json`: what the default strength was chosen from."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    environment: Environment
    rows: tuple[StrengthRow, ...]


def strength_table(content: str) -> str:
    """One table for each fine-tune: what each method and strength keeps, and what it costs.

    Args:
        content: `Strengths` as JSON.

    Returns:
        Markdown.
    """
    results = Strengths.model_validate_json(content)
    parts: list[str] = []
    for (finetune, seed), group in groupby(results.rows, key=lambda row: (row.finetune, row.seed)):
        rows = tuple(group)
        parts += [_strength_heading(finetune, seed, rows[0]), _strength_rows(rows)]
    return "\n\n".join((*parts, small(made_with(results.environment))))


def _strength_heading(finetune: str, seed: int, row: StrengthRow) -> str:
    return (
        f"**{finetune}** (seed {seed}): attack success {_rate(row.aligned_attack_success)} aligned, "
        f"{_rate(row.finetuned_attack_success)} fine-tuned; {row.attack_success.total} harmful prompts, "
        f"{row.task_accuracy.total} task messages."
    )


def _strength_rows(rows: Iterable[StrengthRow]) -> str:
    def named(row: StrengthRow) -> str:
        return ", ".join(filter(None, (row.method, row.budget, row.compensation)))

    def over(row: StrengthRow) -> str:
        return f"{100 * (row.attack_success.value - row.aligned_attack_success.value):+.1f}"

    return Table.of(
        "",
        rows,
        (
            (Column("method", "name"), named),
            ("strength", lambda row: f"{row.strength:g}"),
            ("attack success", lambda row: rate(row.attack_success)),
            ("points over aligned", over),
            ("task accuracy", lambda row: rate(row.task_accuracy)),
            ("gain kept", lambda row: percent(row.kept_gain)),
            ("safety cost", lambda row: percent(row.safety_cost)),
            ("energy kept", lambda row: percent(row.kept_energy)),
            ("entries kept", lambda row: percent(row.kept_entries)),
        ),
    ).markdown(between="<br>")


def _rate(found: Measured) -> str:
    return f"{percent(found.value)} ({interval(found)})"
