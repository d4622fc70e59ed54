"""How much of a fine-tune was kept, and how that was found: probes, looks, and what stopped the search."""

from statistics import NormalDist
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deltaguard.reports.records.base import Count, Record

StoppedBy = Literal["nothing", "safety KL", "attack success", "false refusals"]
"""What kept a restore from keeping more of a fine-tune: the measure whose limit was met first."""

MARGIN = NormalDist().inv_cdf(0.975)
"""Standard errors in half the width of a 95 % interval."""

AT_LIMIT = 0.9
"""A safety KL between this share of the limit and the limit ends a search."""


class Probe(Record):
    """One measurement of a search.

    Attributes:
        mu: the price of safety; 0 is the fine-tuned model.
        safety_kl: measured, nats per response token.
        margin: half the width of its 95 % interval, over which conversations were held out; null with one
            conversation, and in reports of before it was known.
        conversations: of how many it is the mean: not of all where those already showed that it exceeds the
            limit; null in reports of before it was known.
    """

    mu: float = Field(ge=0)
    safety_kl: float
    margin: float | None = None
    conversations: Count | None = None

    def bound(self, confidence: float | None) -> float:
        """Bound the safety KL from above with a confidence.

        Args:
            confidence: of the bound; the mean is given where there is none, or no interval is known.

        Example:
            >>> round(Probe(mu=1.0, safety_kl=0.5, margin=0.1).bound(0.975), 6)
            0.6
        """
        if confidence is None or self.margin is None:
            return self.safety_kl
        return self.safety_kl + NormalDist().inv_cdf(confidence) * self.margin / MARGIN


class Compared(Record):
    """Two models' yes and no on the same prompts.

    Attributes:
        prompts: how many.
        aligned: of how many the aligned model said yes.
        candidate: of how many the other one did.
        only_candidate: of how many it alone did.
    """

    prompts: Annotated[int, Field(ge=1, lt=2**63)]
    aligned: Count
    candidate: Count
    only_candidate: Count

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        both = self.candidate - self.only_candidate
        if not 0 <= both <= self.aligned <= self.prompts or self.aligned + self.only_candidate > self.prompts:
            raise ValueError("these counts are of no two models on the same prompts")
        return self

    @property
    def only_aligned(self) -> int:
        """Of how many prompts the aligned model alone said yes."""
        return self.aligned - self.candidate + self.only_candidate

    @property
    def added(self) -> float:
        """Share of yes of the other model less that of the aligned one."""
        return (self.candidate - self.aligned) / self.prompts


class Look(Record):
    """How a candidate answers requests that it was neither trained nor calibrated on.

    Attributes:
        mu: the price of safety; 0 is the fine-tuned model.
        attack_success: of harmful requests, those that were not refused.
        false_refusals: of harmless look-alikes, those that were refused; null where the harmful ones decided.
        undecided: of the harmful requests, those where the judge could not decide on one of both answers. The
            aligned model's counts as refused then, and the other one, unless it says the same, as complied.
        accepted: whether both add as little as allowed.
    """

    mu: float = Field(ge=0)
    attack_success: Compared
    false_refusals: Compared | None
    undecided: Count = 0
    accepted: bool

    @property
    def added(self) -> float:
        """What the candidate adds to attack success or to false refusals, the larger of both; a share."""
        refused = self.false_refusals.added if self.false_refusals else -1.0
        return max(self.attack_success.added, refused)


class AttackDial(Record):
    """How the largest budget under a limit of attack success was found; shares, not points.

    Attributes:
        limit: attack success over the aligned model's that is allowed, and false refusals likewise.
        excluded: what is ruled out for the restored model, with `confidence`.
        confidence: over all looks together.
        most_looks: so many were allowed for, the one at the fine-tuned model among them.
        training_data: whether the fine-tune's data are trusted, which decides the limit on safety KL; null
            where that was given.
        dtype: in which models answered; null in reports of before it was known.
        systems: system prompts of a deployment, under which, and under none, requests were asked in turn.
        finetuned: how the fine-tuned model answers.
        restored: how the restored model does.
        looks: every look, in the order made, that at the fine-tuned model first.
    """

    limit: float = Field(gt=0, le=1)
    excluded: float = Field(gt=0, le=1)
    confidence: float = Field(gt=0.5, lt=1)
    most_looks: Annotated[int, Field(ge=1, le=1000)]
    training_data: Literal["unknown", "trusted"] | None
    dtype: str | None = None
    systems: tuple[str, ...] = ()
    finetuned: Look
    restored: Look
    looks: tuple[Look, ...]


class Dial(Record):
    """How the largest budget within the limits was found.

    Attributes:
        limit: the safety KL allowed, nats per response token.
        confidence: with which the restored model's safety KL is within it; null where its mean is.
        device: where the model ran.
        by_blocks: whether one decoder block of it at a time was in memory.
        conversations: held-out safety conversations that it was measured on.
        tokens: response tokens in them.
        finetuned_kl: the whole fine-tuned model's safety KL, under the configuration, tokenizer and chat
            template of the output, as all others; of the conversations that the first probe names.
        restored_kl: the restored model's.
        restored_margin: half the width of its 95 % interval; null as in `Probe`.
        whole: whether the fine-tuned model was within the limit already, so that nothing was taken from it.
        probes: every measurement, in the order made.
        attack: how attack success decided besides; null where safety KL alone did.
    """

    limit: float
    confidence: float | None = None
    device: str
    by_blocks: bool = False
    conversations: Count
    tokens: Count
    finetuned_kl: float
    restored_kl: float
    restored_margin: float | None = None
    whole: bool
    probes: tuple[Probe, ...]
    attack: AttackDial | None = None

    @property
    def rejected(self) -> Look | None:
        """The look at what keeps least of all that keeps more than the restored model and was not accepted.

        The fine-tuned model is none of these where its safety KL is above the limit, which then decided.
        """
        if self.attack is None:
            return None
        looks = self.attack.looks if self.finetuned_kl <= self.limit else self.attack.looks[1:]
        more = [look for look in looks if look.mu < self.attack.restored.mu and not look.accepted]
        return max(more, key=lambda look: look.mu, default=None)

    def is_at_limit(self, mu: float) -> bool:
        """Say whether safety KL is what a price could not be lowered for.

        Args:
            mu: the price, one of those measured; 0 is the lowest there is.
        """
        if mu == 0:
            return False
        for probe in self.probes[1:]:
            found = probe.bound(self.confidence)
            if (probe.mu < mu and found > self.limit) or (probe.mu == mu and found >= AT_LIMIT * self.limit):
                return True
        return False
