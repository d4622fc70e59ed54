"""What a sweep over budgets found."""

from typing import Literal

from pydantic import Field

from deltaguard.reports.records.base import Count, Environment, ModelReference, Record, Seconds

SWEEP_NAME = "sweep.json"
"""The file in a sweep's folder that holds its `SweepReport`."""


class SweepPoint(Record):
    """One candidate.

    Attributes:
        mu: the price of safety; 0 is the whole delta.
        safety_kl: measured on held-out safety conversations, nats per response token.
        margin: half the width of its 95 % interval; null with one conversation.
        predicted_safety_kl: by the curvature, likewise, before refusals are levelled.
        kept_energy: ⟨Δ', Δ⟩ / ‖Δ‖² over all layers, share of the delta's energy, before that, too.
        utility_nll: mean negative log-likelihood of the user's utility data, nats per response token; null
            without any.
    """

    mu: float = Field(ge=0)
    safety_kl: float
    margin: float | None = None
    predicted_safety_kl: float
    kept_energy: float
    utility_nll: float | None


class SweepBudget(Record):
    """What a limit of safety KL allows.

    Attributes:
        limit: nats per response token.
        mu: of the point that keeps most among those within the limit; null where none is.
        whole: whether the whole fine-tuned model is within it, with all its tensors.
    """

    limit: float = Field(gt=0)
    mu: float | None = Field(ge=0)
    whole: bool


class SweepReport(Record):
    """Safety against utility over budgets.

    Attributes:
        schema_version: rises when a field changes its meaning.
        environment: versions, machine and time.
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        method: the method.
        confidence: with which a limit was met; null where the mean was within it.
        config_from: the model whose configuration, tokenizer and chat template candidates had; null where
            the two models agree on them.
        conversations: held-out safety conversations.
        tokens: response tokens in them.
        utility_conversations: conversations of the user's utility data.
        aligned_nll: the aligned model's on that data; null without any.
        finetuned_kl: the whole fine-tuned model's safety KL, with all its tensors, run as the candidates are.
        finetuned_nll: that model's on the utility data.
        points: the candidates by price, falling: from the safest to the one that keeps most.
        budgets: the limits asked for, rising.
        seconds: wall time.
        warnings: what must be known besides, a sentence or two each.
    """

    schema_version: int = 2
    environment: Environment
    aligned: ModelReference
    finetuned: ModelReference
    method: str
    confidence: float | None = None
    config_from: Literal["aligned", "finetuned"] | None = None
    conversations: Count
    tokens: Count
    utility_conversations: Count
    aligned_nll: float | None
    finetuned_kl: float
    finetuned_nll: float | None
    points: tuple[SweepPoint, ...] = Field(min_length=1)
    budgets: tuple[SweepBudget, ...] = Field(min_length=1)
    seconds: Seconds
    warnings: tuple[str, ...] = ()

    def kept_gain(self, point: SweepPoint) -> float | None:
        """Share of the gain in likelihood that a candidate keeps; null without a gain to keep."""
        if self.aligned_nll is None or self.finetuned_nll is None or point.utility_nll is None:
            return None
        gain = self.aligned_nll - self.finetuned_nll
        return (self.aligned_nll - point.utility_nll) / gain if gain > 0 else None

    @property
    def has_gain(self) -> bool:
        """Whether there is utility data, and fine-tuning made it likelier."""
        return any(self.kept_gain(point) is not None for point in self.points)

    def kept_share(self, point: SweepPoint) -> float:
        """Say what a point keeps: of the gain where there is one, else of the delta's energy."""
        gain = self.kept_gain(point)
        return point.kept_energy if gain is None else gain
