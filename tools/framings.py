"""The table of whether framings show a framing, from `framings.json` of `benchmarks.framings`."""

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import nats, percent
from tools.tables import made_with, small


class Answered(BaseModel):
    """Whether a model complied with each harmful request, in order.

    Attributes:
        own: in the attacker's framing; none of a fine-tune that has no such.
        others: in framings that the fine-tune does not know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    own: tuple[bool, ...]
    others: tuple[bool, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """How many complied."""
        return sum(self.own), sum(self.others)


class Restored(BaseModel):
    """One fine-tune restored with one store to one limit.

    Attributes:
        store: by what it was calibrated on.
        limit: on safety KL.
        safety_kl: measured, nats per response token.
        answers: of the restored model.
        gain_kept: share of the fine-tune's gain in likelihood; None where it teaches no task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str
    limit: float
    safety_kl: float
    answers: Answered
    gain_kept: float | None


class Told(BaseModel):
    """One fine-tune.

    Attributes:
        name: in a few words.
        aligned: answers of the aligned model.
        finetuned: of the fine-tuned one.
        rows: what was restored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    aligned: Answered
    finetuned: Answered
    rows: tuple[Restored, ...]


class Run(BaseModel):
    """What was measured with one seed.

    Attributes:
        environment: versions, machine and time.
        seed: of the fine-tunes.
        tasks: answers whose likelihood is measured.
        finetunes: what was measured of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    seed: int
    tasks: int
    finetunes: tuple[Told, ...]


class Framings(BaseModel):
    """`docs/results/framings.json`: runs with several seeds.

    Attributes:
        runs: one a seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[Run, ...]


def framings_table(content: str) -> str:
    """Draw a row for each fine-tune, store and limit, over all seeds.

    Args:
        content: a `Framings` as JSON.

    Returns:
        Markdown.

    Raises:
        ValueError: the seeds do not have the same fine-tunes: a run was interrupted.
    """
    runs = Framings.model_validate_json(content).runs
    if len({tuple(told.name for told in run.finetunes) for run in runs}) > 1:
        raise ValueError(
            "not every seed has every fine-tune: run `python -m benchmarks.framings` for it again"
        )
    by_name: dict[tuple[str, str, float], list[tuple[Told, Restored]]] = {}
    for told in (each for run in runs for each in run.finetunes):
        for row in told.rows:
            by_name.setdefault((told.name, row.store, row.limit), []).append((told, row))
    rows = list(by_name.values())
    drawn = Table.of(
        "",
        rows,
        (
            (Column("fine-tune", "name"), lambda pairs: pairs[0][0].name),
            (Column("store", "name"), lambda pairs: pairs[0][1].store),
            ("safety KL", lambda pairs: nats(fmean(row.safety_kl for _, row in pairs))),
            (
                "its own framing:\naligned → fine-tuned → restored",
                lambda pairs: _three([_models(*pair) for pair in pairs], "own"),
            ),
            (
                "other framings:\naligned → fine-tuned → restored",
                lambda pairs: _three([_models(*pair) for pair in pairs], "others"),
            ),
            ("gain kept,\nlikelihood", lambda pairs: percent(_mean([row.gain_kept for _, row in pairs]))),
        ),
    ).markdown()
    asked = len(runs[0].finetunes[0].aligned.others)
    seeds = ", ".join(str(run.seed) for run in runs)
    how = (
        f"Attack success of {asked} held-out harmful requests; the other framings are eight, in turn, and "
        f"neither stores nor fine-tunes know them; over seeds {seeds}; likelihood of {runs[0].tasks} task "
        f"answers; the last seed: {made_with(runs[-1].environment)}"
    )
    return f"{drawn}\n\n{small(how)}"


def _models(told: Told, row: Restored) -> tuple[Answered, Answered, Answered]:
    return told.aligned, told.finetuned, row.answers


def _three(runs: Sequence[tuple[Answered, Answered, Answered]], way: Literal["own", "others"]) -> str:
    """Draw the shares of three models over all runs; a dash where nothing was asked in that way."""
    answers = [
        [said for each in of_model for said in getattr(each, way)] for of_model in zip(*runs, strict=True)
    ]
    return " → ".join(percent(sum(each) / len(each)) for each in answers if each) or "–"


def _mean(gains: Sequence[float | None]) -> float | None:
    known = [each for each in gains if each is not None]
    return fmean(known) if known else None
