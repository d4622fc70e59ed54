"""What a restore did, would do, and left on disk."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from deltaguard.reports.records.base import Count, Environment, ModelReference, Record, Seconds
from deltaguard.reports.records.dial import Dial, StoppedBy

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
    """An expert that safety conversations rarely reach: its curvature is nearly that of its block's experts.

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
