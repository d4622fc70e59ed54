"""Refining: after the shrink, steps on the restored layers towards what both models predict; then measured.

The shrink weighs a layer's delta by its squared norm; what of it a user would notice is not asked. The steps
ask that: they lower KL(fine-tuned ‖ candidate) on the fine-tuned model's own answers to harmless prompts, and
KL(aligned ‖ candidate) on the aligned model's own answers to calibration prompts (see `descent`). They need
no data of a customer, and the whole model in memory, in float32 and with gradients.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter
from torch import Tensor

from deltaguard.errors import DeltaguardError
from deltaguard.models.shards import tensor_bytes
from deltaguard.models.writer import CheckpointWriter
from deltaguard.progress import Event, Progress
from deltaguard.reports.records.dial import Dial, Look, Probe
from deltaguard.reports.records.restore import LayerRow, Refinement
from deltaguard.reports.text import points
from deltaguard.restoration.acceptance import Rule
from deltaguard.restoration.candidate import CandidateModel
from deltaguard.restoration.dial import Price, judge_of
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.looks import Requests
from deltaguard.restoration.plan import Step
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.trial import Edited, Trial
from deltaguard.restoration.tuning import BATCH, CONVERSATIONS, SEED, Tuning, output_curvature
from deltaguard.solvers import project


@dataclass(frozen=True)
class _Remembered:
    """What a resumed run must know."""

    record: Refinement
    dial: Dial


_KEPT = TypeAdapter(_Remembered)


@dataclass(frozen=True)
class Refined:
    """What became of the layers.

    Attributes:
        trial: the layers.
        price: the price that they were restored at; its dial tells of the layers as they are written.
        record: what was done; None where nothing was.
        tensors: of the output, by name; none where the layers stay as the shrink left them.
    """

    trial: Trial
    price: Price
    record: Refinement | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say where nothing was refined though it was asked for."""
        if self.tensors or not self.trial.config.refine or (self.record and self.record.kept):
            return ()
        reason = self.record.reason if self.record else "the whole fine-tune is within the limits"
        return (f"The output is not refined: {reason}.",)

    def edited(self, given: Edited) -> Edited:
        """Put the refined tensor in the place of one that the shrink left, with what is told of it."""
        row, tensor = given.row, self.tensors.get(given.row.name)
        if tensor is None or not isinstance(row, LayerRow):
            return given
        (step,) = (step for step in self.trial.steps if step.info.name == row.name)
        return Edited(tensor, _row(self.trial, step, row, tensor))


def refined_layers(
    trial: Trial, price: Price, writer: CheckpointWriter, resident: Resident, report: Progress
) -> Refined:
    """Refine the layers of a restore, if that is asked for, and keep them if they hold to the limits.

    Args:
        trial: the layers.
        price: what they were restored at.
        writer: of the output; it remembers what came out. A resumed run takes the same steps again.
        resident: gives up the aligned model that it holds, since two at once might not fit.
        report: told of steps and measurements.

    Raises:
        DeltaguardError: the model cannot be run, or a resumed run does not come to the same weights.
    """
    steps, dial = trial.config.refine, price.dial
    if not steps or dial is None or dial.whole:
        return Refined(trial, price)
    resident.release()
    known = writer.remembered("refinement", _KEPT)
    if known is None:
        refined = _refined(trial, price, dial, steps, resident, report)
        if refined.record is not None and refined.price.dial is not None:
            kept = _Remembered(refined.record, refined.price.dial)
            writer.remember("refinement", _KEPT.dump_python(kept, mode="json"))
        return refined
    chosen = replace(price, dial=known.dial)
    unfinished = any(writer.finished(shard) is None for shard in trial.job.finetuned.shards)
    if not known.record.kept or not unfinished:
        return Refined(trial, chosen, known.record)
    tensors = Tuning.open(trial, price.mu, report).run(steps).tensors()
    if _hash(tensors) != known.record.weights_sha256:
        raise DeltaguardError(
            "Refining came to other weights than before this run was interrupted, so that shards would not "
            "fit each other: another machine or number of threads rounds otherwise. Resume where the run "
            "began, or start anew in another folder."
        )
    return Refined(trial, chosen, known.record, tensors)


def refine_cost(
    parameters: int, entries: int, curvature: int, vocabulary: int, *, answer: int
) -> tuple[int, float]:
    """Estimate the memory of refining, and the arithmetic of a step.

    Args:
        parameters: of the model.
        entries: of the layers that are restored.
        curvature: bytes that the store keeps of them.
        vocabulary: rows of it.
        answer: tokens that a model answers at most.

    Returns:
        Bytes, activations not counted; and floating-point operations.
    """
    text = 100
    known = 2 * CONVERSATIONS * answer * vocabulary
    # Gradients, preconditioned ones, and the weights before a step.
    memory = 4 * (parameters + 3 * entries + known) + curvature
    return memory, 8 * parameters * 2 * BATCH * text


def _refined(
    trial: Trial, price: Price, dial: Dial, steps: int, resident: Resident, report: Progress
) -> Refined:
    """Take the steps, and judge what comes out."""
    started = time.perf_counter()
    tuning = Tuning.open(trial, price.mu, report).run(steps)
    after = tuning.divergences() if tuning.taken else tuning.before
    tensors = tuning.tensors()
    record = Refinement(
        steps=steps,
        taken=tuning.taken,
        kept=False,
        reason=None,
        seed=SEED,
        conversations=CONVERSATIONS,
        safety_before=tuning.before[0],
        safety_after=after[0],
        task_before=tuning.before[1],
        task_after=after[1],
        safety_kl_before=dial.restored_kl,
        safety_kl_after=None,
        weights_sha256=None,
        seconds=0.0,
    )
    rises = tuning.objective.of(*after) >= tuning.objective.of(*tuning.before)
    # Two models at once might not fit.
    del tuning
    changed, reason = dial, "no step lowered the loss" if not record.taken else None
    if reason is None and rises:
        reason = "the loss on all conversations rose"
    probe = None
    if reason is None:
        changed, probe, reason = _judged(trial, price, dial, tensors, resident, report)
    record = record.model_copy(
        update={
            "kept": reason is None,
            "reason": reason,
            "safety_kl_after": None if probe is None else probe.safety_kl,
            "weights_sha256": _hash(tensors) if reason is None else None,
            "seconds": time.perf_counter() - started,
        }
    )
    return Refined(trial, replace(price, dial=changed), record, tensors if reason is None else {})


def _judged(
    trial: Trial,
    price: Price,
    dial: Dial,
    tensors: Mapping[str, Tensor],
    resident: Resident,
    report: Progress,
) -> tuple[Dial, Probe, str | None]:
    """Measure the refined layers as the dial does, and ask them where it asks.

    Returns:
        The dial, which tells of them where they are accepted; the measurement; and why they are not.
    """
    attack, limit = dial.attack, dial.limit
    if attack is None:
        candidate, examiner = resident.loaded(trial), None
    else:
        rule = Rule(limit=attack.limit, looks=attack.most_looks)
        requests = Requests.of(trial.config.prompts, known_store(trial.job).provenance.systems)
        candidate, examiner = resident.examined(trial, rule, requests, report)
    assert isinstance(candidate, CandidateModel), "what is refined is in memory as a whole"  # noqa: S101
    candidate.take_others()
    candidate.meter.put(tensors.items())
    found = candidate.meter.measure()
    probe = Probe(mu=price.mu, safety_kl=found.mean, margin=found.margin, conversations=found.conversations)
    report(Event("measure", 1, 1, f"safety KL {found.mean:.2g} refined"))
    if (judged := judge_of(trial.config)(probe)) > limit:
        return dial, probe, f"its safety KL would be {judged:.2g}, above {limit:.2g}"
    changed = {"restored_kl": found.mean, "restored_margin": found.margin}
    if attack is None or examiner is None:
        return dial.model_copy(update=changed), probe, None
    candidate.looked = len(attack.looks)
    look: Look = candidate.look(price.mu, examiner, report, most=attack.most_looks)
    asked = attack.model_copy(update={"looks": (*attack.looks, look)})
    if not look.accepted:
        added = points(100 * look.added)
        reason = f"it would add {added} points of attack success or false refusals, or more is not ruled out"
        return dial.model_copy(update={"attack": asked}), probe, reason
    asked = asked.model_copy(update={"restored": look})
    return dial.model_copy(update={**changed, "attack": asked}), probe, None


def _row(trial: Trial, step: Step, row: LayerRow, tensor: Tensor) -> LayerRow:
    """Say of a refined layer what the method says of a shrunk one."""
    job, store = trial.job, known_store(trial.job)
    aligned, finetuned, refined = (
        (each.T if step.transposed else each).to(trial.device).float()
        for each in (job.aligned.read(step.aligned_name), job.finetuned.read(step.info.name), tensor)
    )
    assert step.group is not None, "a layer that is refined has a curvature"  # noqa: S101
    inputs, outputs = store.input_spectrum(step.group), output_curvature(trial, step)
    inputs, outputs = inputs.to(trial.device), outputs.to(trial.device)
    whole, kept = (project(each - aligned, inputs, outputs).directions for each in (finetuned, refined))
    delta, left = finetuned - aligned, refined - aligned
    energy = float(whole.energies.sum())
    predicted = kept.profile().predicted_kl(0)
    cost, most = (float((each.h * each.energies).sum()) for each in (kept, whole))
    return row.model_copy(
        update={
            "kept_energy": float((left.double() * delta.double()).sum()) / energy,
            "utility_loss": float((left - delta).double().square().sum()) / energy,
            "safety_cost": cost / most if most else 0.0,
            "detail": {
                **row.detail,
                "safety_kl_share": predicted / (whole.profile().predicted_kl(0) or 1.0),
                "predicted_safety_kl": predicted,
            },
        }
    )


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
