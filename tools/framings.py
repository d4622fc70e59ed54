"""The table of whether framings show a framing, from `framings.json` of `benchmarks.framings`."""

from collections.abc import Sequence

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


class Framings(BaseModel):
    """`docs/results/framings.json`.

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


def framings_table(content: str) -> str:
    """Draw a row for each fine-tune, store and limit.

    Args:
        content: a `Framings` as JSON.

    Returns:
        Markdown.
    """
    found = Framings.model_validate_json(content)
    rows = [(told, row) for told in found.finetunes for row in told.rows]
    drawn = Table.of(
        "",
        rows,
        (
            (Column("fine-tune", "name"), lambda pair: pair[0].name),
            (Column("store", "name"), lambda pair: pair[1].store),
            ("safety KL", lambda pair: nats(pair[1].safety_kl)),
            (
                "its own framing:\naligned → fine-tuned → restored",
                lambda pair: _three([each.own for each in _models(*pair)]),
            ),
            (
                "other framings:\naligned → fine-tuned → restored",
                lambda pair: _three([each.others for each in _models(*pair)]),
            ),
            ("gain kept,\nlikelihood", lambda pair: percent(pair[1].gain_kept)),
        ),
    ).markdown()
    asked = len(found.finetunes[0].aligned.others)
    how = (
        f"Attack success of {asked} held-out harmful requests; the other framings are eight, in turn, and "
        f"neither stores nor fine-tunes know them; seed {found.seed}; likelihood of {found.tasks} task "
        f"answers; {made_with(found.environment)}"
    )
    return f"{drawn}\n\n{small(how)}"


def _models(told: Told, row: Restored) -> tuple[Answered, Answered, Answered]:
    return told.aligned, told.finetuned, row.answers


def _three(answers: Sequence[tuple[bool, ...]]) -> str:
    shares = [percent(sum(each) / len(each)) if each else None for each in answers]
    return " → ".join(share for share in shares if share) or "–"
