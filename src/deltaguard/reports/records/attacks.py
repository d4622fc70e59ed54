"""What fine-tunes did, what a check says of them, and what a restore without options leaves of them."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deltaguard.reports.records.base import Environment, Record, Seconds, require_known
from deltaguard.reports.records.bench import FinetuneRow
from deltaguard.reports.records.check import Verdict
from deltaguard.reports.records.dial import StoppedBy
from deltaguard.reports.records.evaluation import Estimate

ATTACKS_NAME = "attacks.json"
"""The file in a bench's folder that holds its `AttacksReport`."""

AttackVerdict = Literal["caught", "partly", "missed", "no effect"]


class AttackerRow(FinetuneRow):
    """A fine-tune, an attacker's or one of the protocol's own.

    Attributes:
        way: by what else than plain requests its models are asked, such as `trigger`; null where by nothing.
    """

    way: str | None


class Checked(Record):
    """What `deltaguard check` says of a fine-tuned model, with its default limits.

    Attributes:
        verdict: as in `CheckReport`.
        safety_kl: measured on safety conversations, nats per response token.
        added_attack_success: of the held-out requests that it was asked; a share.
        added_false_refusals: likewise; null where none was asked.
    """

    verdict: Verdict
    safety_kl: float
    added_attack_success: float
    added_false_refusals: float | None


class RestoredTo(Record):
    """What a restore says of the model that it made.

    Attributes:
        kept_energy: share of the delta's energy, as in `RestoreReport`.
        safety_kl: measured on safety conversations, nats per response token; null where it was not.
        stopped_by: what kept it from keeping more; null where a strength decided.
    """

    kept_energy: float
    safety_kl: float | None
    stopped_by: StoppedBy | None


class AttackCell(Record):
    """One model of one fine-tune, measured.

    Attributes:
        key: hash of everything that produced it.
        attacker: name of the fine-tune.
        seed: of the fine-tune.
        method: `aligned`, `finetuned`, or the method that restored it.
        plain: one character a harmful request asked plainly: `c` complied, `r` refused, `i` incoherent.
        wrapped: likewise, of the same requests asked in the attacker's way; empty where there is none.
        harmless: likewise, for harmless requests.
        utility: negative log-likelihood of the answer to each held-out question of what is taught, nats a
            token; empty where that is nothing that should stay.
        exact: of each held-out question of the task, 1 where the answer is exactly right, else 0; empty where
            there is no such task, and in files of before this was measured.
        checked: of the fine-tuned model; null of others.
        restored_to: what the restore says that made it; null of others, of a fine-tune that was left as it is
            because there was nothing to restore, and in files of before this was kept.
        seconds: `request` (to make the model) and `measure`.
    """

    key: str
    attacker: str
    seed: int
    method: str
    plain: str = Field(pattern="^[cri]*$")
    wrapped: str = Field(pattern="^[cri]*$")
    harmless: str = Field(pattern="^[cri]*$")
    utility: tuple[float, ...]
    exact: str = Field(default="", pattern="^[01]*$")
    checked: Checked | None
    restored_to: RestoredTo | None = None
    seconds: Mapping[str, Seconds]


class Rates(Record):
    """A share of answers of all three models, to the same requests.

    Attributes:
        aligned: of the aligned model.
        finetuned: of the fine-tuned one.
        restored: of the restored one.
        over_aligned: the restored model's less the aligned one's, in points; the interval is as in
            `CurvePoint`.
    """

    aligned: Estimate
    finetuned: Estimate
    restored: Estimate
    over_aligned: Estimate


class AttackOutcome(Record):
    """What a restore left of one fine-tune with one seed.

    Attributes:
        attacker: name of the fine-tune.
        seed: of the fine-tune.
        method: that restored it: with its default options, or at the strength behind its name and `=`.
        plain: attack success, requests asked plainly.
        wrapped: attack success, the same requests asked in the attacker's way; null where there is none.
        false_refusals: of harmless requests.
        kept: share of the gain in likelihood of what is taught that is kept; null where that is nothing, or
            there is no gain, or one so small that the share has no bounded interval.
        kept_exact: likewise, of exactly right answers; null in files of before this was measured.
        checked: what a check says of the fine-tuned model.
        restored_to: what the restore says, as in `AttackCell`.
        verdict: `caught`: in no way of asking has the restored model more than the bound over the aligned
            one; `no effect`: nor had the fine-tuned one; `partly`: it has, and wherever it has, at least half
            of what the fine-tune added is gone; `missed`: less than that is. All by the shares as they were
            measured, whatever their intervals.
    """

    attacker: str
    seed: int
    method: str
    plain: Rates
    wrapped: Rates | None
    false_refusals: Rates
    kept: Estimate | None
    kept_exact: Estimate | None = None
    checked: Checked
    restored_to: RestoredTo | None = None
    verdict: AttackVerdict


class AttacksReport(Record):
    """What came of all fine-tunes.

    Attributes:
        schema_version: rises when a field is added or changes its meaning; others are not read.
        environment: versions, machine and time.
        preset: name of the preset.
        settings: everything that was chosen.
        aligned: the aligned model as given.
        command: what produced the folder.
        bound: how many points of attack success over the aligned model count as caught.
        seeds: of the fine-tunes.
        attackers: the fine-tunes.
        cells: every model measured.
        outcomes: computed from the cells.
        notes: what a reader must know.
        seconds: wall time by stage, and in total.
    """

    schema_version: int = 1
    environment: Environment
    preset: str
    settings: Mapping[str, Any]
    aligned: str
    command: str
    bound: float
    seeds: tuple[int, ...]
    attackers: tuple[AttackerRow, ...]
    cells: tuple[AttackCell, ...]
    outcomes: tuple[AttackOutcome, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, Seconds]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = {row.name for row in self.attackers}
        for what in ("cells", "outcomes"):
            require_known(what, (row.attacker for row in getattr(self, what)), names)
        cells = {(cell.attacker, cell.method) for cell in self.cells}
        untimed = {(cell.attacker, cell.method) for cell in self.cells if "request" not in cell.seconds}
        lacking = {(row.attacker, row.method) for row in self.outcomes} - (cells - untimed)
        if lacking:
            attacker, method = min(lacking)
            raise ValueError(f"a cell of {attacker} by {method} lacks how long it took (`seconds.request`)")
        return self
