"""What a restore did, would do, and left on disk."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deltaguard.reports.records.base import Count, Environment, ModelReference, Record, Seconds

REPORT_NAME = "deltaguard_report.json"
"""The file in a restored checkpoint that holds its `RestoreReport`."""

CARD_NAME = "README.md"
"""The file in a restored checkpoint that holds its model card."""


class LayerRow(Record):
    """One restored weight matrix, or a stack of those of experts: then shares are means, weighted by ‖Δ‖².

    Attributes:
        name: the tensor's name in the fine-tuned checkpoint.
        shape: as stored.
        delta_norm: ‖Δ‖, Frobenius.
        kept_energy: ⟨Δ', Δ⟩ / ‖Δ‖², share of the delta's energy.
        kept_entries: share of the delta's entries at the fine-tuned value; null where the method selects no
            entries, or there is no delta.
        safety_cost: tr(Δ'HΔ'ᵀ) / tr(ΔHΔᵀ), with H as the store keeps it; null where no curvature is known,
            and of a layer that an adapter's rank cut off, unless the method decides by factors itself.
        utility_loss: ‖Δ' - Δ‖² / ‖Δ‖².
        seconds: time of the solver.
        detail: numbers that belong to one method.
    """

    name: str
    shape: tuple[Count, ...]
    delta_norm: float = Field(ge=0)
    kept_energy: float
    kept_entries: float | None
    safety_cost: float | None
    utility_loss: float
    seconds: Seconds
    detail: Mapping[str, int | float] = Field(default_factory=dict[str, int | float])


class RareExpert(Record):
    """An expert that safety conversations rarely reach: most of its curvature is of its block's experts.

    Attributes:
        name: in the aligned checkpoint.
        tokens: of the safety conversations that were routed to it.
        pooled: share of a curvature of its layers that is of all experts of the block, the largest.
    """

    name: str
    tokens: Count
    pooled: float = Field(ge=0, le=1)


class OtherRow(Record):
    """A tensor that no solver touched, the model it was taken from, and why."""

    name: str
    source: Literal["aligned", "finetuned", "both"]
    reason: str
    differs: bool


class FileRow(Record):
    """A file as written.

    Attributes:
        name: its path within the output folder.
        bytes: its size.
        sha256: the hash of its content.
    """

    name: str
    bytes: Count
    sha256: str


StoppedBy = Literal["nothing", "safety KL", "attack success", "false refusals"]
"""What kept a restore from keeping more of a fine-tune: the measure whose limit was met first."""

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
        accepted: whether both add as little as allowed.
    """

    mu: float = Field(ge=0)
    attack_success: Compared
    false_refusals: Compared | None
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
            mu: the price, one of those measured.
        """
        for probe in self.probes[1:]:
            doubt = probe.margin or 0.0 if self.confidence is not None else 0.0
            is_above = probe.mu < mu and probe.safety_kl + doubt > self.limit
            if is_above or (probe.mu == mu and probe.safety_kl + doubt >= AT_LIMIT * self.limit):
                return True
        return False


class Refinement(Record):
    """Steps on the restored layers, after the shrink; all divergences in nats per response token.

    Attributes:
        steps: asked for.
        taken: steps that were taken; each of the others would have raised the loss of its batch.
        kept: whether the output has the refined layers.
        reason: why not, null where it has.
        seed: of the conversations.
        conversations: for each of the two divergences.
        safety_before: KL(aligned ‖ candidate) on calibration conversations that the aligned model answered.
        safety_after: likewise, refined.
        task_before: KL(fine-tuned ‖ candidate) on harmless ones that the fine-tuned model answered.
        task_after: likewise, refined.
        safety_kl_before: on the conversations held out, as the dial measures it.
        safety_kl_after: likewise, refined; null where it was not measured.
        weights_sha256: of the refined layers, by which a resumed run knows that it made the same again; null
            where they are not kept.
        seconds: that it took.
    """

    steps: Count
    taken: Count
    kept: bool
    reason: str | None
    seed: int
    conversations: Count
    safety_before: float
    safety_after: float
    task_before: float
    task_after: float
    safety_kl_before: float
    safety_kl_after: float | None
    weights_sha256: str | None
    seconds: Seconds


class RestoreReport(Record):
    """The report of a restore: what it ran with, what became of each tensor, what it wrote.

    Attributes:
        schema_version: rises when a field changes its meaning.
        environment: versions, machine and time.
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        store_conversations: sha256 of the safety conversations behind the curvature, null without a store.
        options: method, strength and the other choices, as run.
        method_title: what the method does, in words.
        layers: one row a restored matrix, in the order of the checkpoint.
        others: one row for every other tensor.
        files: every file of the output but this report, with its hash; a run that replaces the output removes
            these and no others.
        plan_hash: of the job that wrote the output, by which it is known again; null in reports of before it
            was kept.
        mu: the price of safety of all layers, null for methods that have none.
        predicted_safety_kl: ½ Σ tr(G Δ' H Δ'ᵀ) over the layers, nats per response token; likewise.
        dial: how the price was found, null where a strength decided.
        refinement: steps taken after it, null without any.
        kept_energy: Σ⟨Δ', Δ⟩ / Σ‖Δ‖² over the layers that differ.
        kept_entries: mean over them, weighted by entries; null where the method selects none.
        utility_loss: Σ‖Δ' - Δ‖² / Σ‖Δ‖² over them.
        safety_cost: median over them, null without curvature.
        seconds: wall time: total of this run; solve of all layers, those of an interrupted run included; and
            measure and ask, of the candidates of the search that found the price.
        peak_memory_bytes: largest resident memory of the process; null where that is of what it did before
            the restore, so that the restore's own is not known.
        warnings: what must be known besides, a sentence or two each.
        rare_experts: of a mixture of experts, those that safety conversations rarely reach.
    """

    schema_version: int = 2
    environment: Environment
    aligned: ModelReference
    finetuned: ModelReference
    store_conversations: str | None
    options: Mapping[str, str | int | float | bool | None]
    method_title: str
    layers: tuple[LayerRow, ...]
    others: tuple[OtherRow, ...]
    files: tuple[FileRow, ...]
    plan_hash: str | None = None
    mu: float | None = None
    predicted_safety_kl: float | None = None
    dial: Dial | None = None
    refinement: Refinement | None = None
    kept_energy: float
    kept_entries: float | None
    utility_loss: float
    safety_cost: float | None
    seconds: Mapping[str, Seconds]
    peak_memory_bytes: Count | None
    warnings: tuple[str, ...] = ()
    rare_experts: tuple[RareExpert, ...] = ()

    @property
    def stopped_by(self) -> StoppedBy:
        """What kept the dial from keeping more; `nothing` where there was no more, or a strength decided."""
        dial = self.dial
        if dial is None or dial.whole:
            return "nothing"
        if dial.rejected is not None:
            # Harmless requests are asked where the harmful ones have accepted.
            return "false refusals" if dial.rejected.false_refusals else "attack success"
        return "safety KL" if self.mu is not None and dial.is_at_limit(self.mu) else "nothing"


class DialPlan(Record):
    """How the dial would measure candidates, and what of memory that takes; all bytes are about.

    Attributes:
        by_blocks: whether one decoder block is measured after another, and not the model as a whole.
        limit_bytes: what the model may take as a whole, with what the aligned one predicts.
        at_once: prices that a pass measures.
        ends_bytes: block by block, of what is in no block, of both models in float32; else 0, as the others.
        block_bytes: of the largest block in float32.
        hidden_bytes: of the hidden states of held-out conversations, the aligned model's and each price's.
        weights_bytes: of a block's weights at each price, as they would be written.
    """

    by_blocks: bool
    limit_bytes: int
    at_once: int
    ends_bytes: int = 0
    block_bytes: int = 0
    hidden_bytes: int = 0
    weights_bytes: int = 0


class PlanReport(Record):
    """What a restore would do, from headers alone.

    Attributes:
        restored: tensors that a solver decides.
        from_aligned: tensors taken whole from the aligned model.
        from_finetuned: tensors taken whole from the fine-tuned model.
        extended: tensors of both: shared vocabulary rows and those that only the fine-tuned model has.
        read_bytes: weights that will be read.
        write_bytes: weights that will be written.
        disk_bytes: that the output folder still needs; 0 where none was named, or its output is there.
        curvature_bytes: curvature that will be read.
        peak_bytes: estimate of the memory that tensors of one layer and the next will take at once.
        dial: how the dial would measure; null without it.
        dial_bytes: of all that the dial takes: the model in float32, its weights once more in the dtype that
            it is asked in, and what the aligned one predicts, or block by block the parts that `dial` names,
            and a layer and the next; 0 without the dial.
        kept_bytes: of prepared layers that wait for the next price, at most.
        refine_bytes: of the model while it is refined, with gradients, in float32; 0 where it is not.
        device: where layers are solved, and the model runs that the dial measures.
        seconds: estimate for the arithmetic alone, at the rate at which the device multiplies matrices;
            reading and writing come on top, and a calibration where it is needed.
        note: what the plan could not know.
    """

    restored: int
    from_aligned: int
    from_finetuned: int
    extended: int
    read_bytes: int
    write_bytes: int
    disk_bytes: int = 0
    curvature_bytes: int
    peak_bytes: int
    dial: DialPlan | None = None
    dial_bytes: int
    kept_bytes: int
    refine_bytes: int = 0
    device: str
    seconds: Seconds
    note: str | None = None


class Verification(Record):
    """The outcome of `verify`.

    Attributes:
        folder: what was checked.
        tensors: how many tensors were read.
        problems: one sentence each; empty where all is well.
        unchecked: what could not be checked, and why; one sentence each.
    """

    folder: str
    tensors: int
    problems: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems
