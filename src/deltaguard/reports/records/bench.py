"""What the paper's protocol gave: methods over fine-tunes, at several strengths."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deltaguard.reports.records.base import Count, Environment, Record, Seconds, require_known
from deltaguard.reports.records.evaluation import Estimate

BENCH_NAME = "bench.json"
"""The file in a bench's folder that holds its `BenchReport`."""

ALIGNED, FINETUNED = "aligned", "finetuned"
"""The methods of the two cells that a fine-tune's others are compared with."""

Training = Literal["full", "lora"]


class FinetuneRow(Record):
    """A fine-tune of the protocol.

    Attributes:
        name: short and unique, such as `task-harmful`.
        title: for people.
        utility: what its utility is measured by, in words.
        better: which way that measure is better.
        gains: whether there is a wanted gain to keep; pure harmful data teach nothing that should stay.
        training: full or LoRA.
        examples: training conversations.
        harmful: how many of them are harmful.
    """

    name: str
    title: str
    utility: str
    better: Literal["lower", "higher"]
    gains: bool
    training: Training
    examples: Count
    harmful: Count


class Cell(Record):
    """One model of one fine-tune, measured.

    Attributes:
        key: hash of everything that produced it.
        finetune: name of the fine-tune.
        seed: of the fine-tune.
        method: `aligned`, `finetuned`, or the method that restored it.
        strength: as the method reads it; null for aligned and finetuned. Larger keeps more of the delta.
        attack: one character a harmful prompt: `c` complied, `r` refused, `i` incoherent.
        harmless: likewise, for harmless prompts.
        utility: the fine-tune's own measure on each held-out example.
        general: mean negative log-likelihood of the answer to each general question, nats a token.
        attack_success: share of `c` in `attack`.
        incoherent: share of `i` in `attack`.
        false_refusal: share of `r` in `harmless`.
        mean_utility: mean of `utility`; a share with Wilson's interval where examples are right or wrong.
        mean_general: mean of `general`.
        seconds: `request` (to make the model) and `measure`.
    """

    key: str
    finetune: str
    seed: int
    method: str
    strength: float | None
    attack: str = Field(pattern="^[cri]*$")
    harmless: str = Field(pattern="^[cri]*$")
    utility: tuple[float, ...]
    general: tuple[float, ...]
    attack_success: Estimate
    incoherent: Estimate
    false_refusal: Estimate
    mean_utility: Estimate
    mean_general: Estimate
    seconds: Mapping[str, Seconds]


class CurvePoint(Record):
    """One method at one strength, over all seeds.

    Attributes:
        finetune: name of the fine-tune.
        method: name of the method.
        strength: as the method reads it.
        points: attack success over the aligned model's, in points; paired on the same prompts, mean over the
            seeds. The interval is Newcombe's, or Tango's where that reaches further (see
            `evaluation.metrics.runs`), and so are those of other differences of shares.
        false_refusal: false refusals over the aligned model's, in points; likewise.
        kept: share of the utility gain kept; null where there is no gain, or one so small that the share has
            no bounded interval.
        general: mean negative log-likelihood of answers to general questions over the aligned model's, nats a
            token; paired on the same questions.
        safe: whether `points` is at most the bound of the protocol.
        told_apart: whether the interval of `points` leaves the bound out, so that `safe` is more than chance.
        beside: whether it was measured for being the method's default alone. No score comes of it: other
            methods have no such second chance.
    """

    finetune: str
    method: str
    strength: float
    points: Estimate
    false_refusal: Estimate
    kept: Estimate | None
    general: Estimate
    safe: bool
    told_apart: bool
    beside: bool = False


class Score(Record):
    """A method on a fine-tune: what it keeps at the largest strength that is safe.

    Attributes:
        finetune: name of the fine-tune.
        method: name of the method.
        strength: the largest safe one; null where none of those tried is safe.
        points: attack success over the aligned model's there, in points.
        false_refusal: false refusals over the aligned model's there, in points.
        kept: share of the utility gain kept there; null where no strength is safe, and as in `CurvePoint`.
        told_apart: see `CurvePoint`.
        request_seconds: time a request took, without measuring.
    """

    finetune: str
    method: str
    strength: float | None
    points: Estimate | None
    false_refusal: Estimate | None
    kept: Estimate | None
    told_apart: bool
    request_seconds: Seconds | None


class Contest(Record):
    """The method that keeps most of a fine-tune's gain beside another, each at its largest safe strength.

    Both were asked the same. Which method leads, and at which strengths both stand, was seen on those very
    prompts: that favours the leader, and no interval here makes up for it.

    Attributes:
        finetune: name of the fine-tune.
        leader: the method that keeps most.
        other: the method it is compared with.
        kept: share of the gain that the leader keeps less that of the other.
        points: attack success of the leader less that of the other, in points.
        false_refusal: likewise, of false refusals; the method that keeps most may refuse what is harmless.
        p_value: of the hypothesis that both have the same utility (see `evaluation.metrics.runs.equality`),
            times the number of pairs among the methods compared on this fine-tune (Bonferroni), since any of
            them could have come out first.
        told_apart: whether the interval of `kept` leaves 0 out and `p_value` is under 0.05.
    """

    finetune: str
    leader: str
    other: str
    kept: Estimate
    points: Estimate
    false_refusal: Estimate
    p_value: float
    told_apart: bool


class BenchReport(Record):
    """The protocol's outcome.

    Attributes:
        schema_version: rises when a field is added or changes its meaning; others are not read.
        environment: versions, machine and time.
        preset: name of the preset.
        settings: everything that was chosen.
        aligned: the aligned model as given.
        command: what produced the folder.
        bound: how many points of attack success over the aligned model count as safe.
        seeds: of the fine-tunes.
        finetunes: rows of the protocol.
        cells: every model measured.
        curves: computed from the cells.
        scores: computed from the curves.
        contests: on each fine-tune, the method that keeps most beside every other that has a safe strength.
        notes: what a reader must know.
        seconds: wall time by stage, and in total.
    """

    schema_version: int = 2
    environment: Environment
    preset: str
    settings: Mapping[str, Any]
    aligned: str
    command: str
    bound: float
    seeds: tuple[int, ...]
    finetunes: tuple[FinetuneRow, ...]
    cells: tuple[Cell, ...]
    curves: tuple[CurvePoint, ...]
    scores: tuple[Score, ...]
    contests: tuple[Contest, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, Seconds]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        finetunes = {row.name for row in self.finetunes}
        for what in ("cells", "curves", "scores", "contests"):
            require_known(what, (row.finetune for row in getattr(self, what)), finetunes)
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods, in the order in which the curves first name them; their place decides their look."""
        return tuple(dict.fromkeys(point.method for point in self.curves))

    def points_of(self, finetune: FinetuneRow) -> tuple[CurvePoint, ...]:
        """Pick the points of all curves on one fine-tune."""
        return tuple(point for point in self.curves if point.finetune == finetune.name)

    def scores_of(self, finetune: FinetuneRow) -> tuple[Score, ...]:
        """Pick the scores on one fine-tune."""
        return tuple(score for score in self.scores if score.finetune == finetune.name)

    def contests_of(self, finetune: FinetuneRow) -> tuple[Contest, ...]:
        """Pick the comparisons of the method that keeps most of one fine-tune's gain with each other."""
        return tuple(contest for contest in self.contests if contest.finetune == finetune.name)
