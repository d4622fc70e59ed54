"""A peer's method applied to whole checkpoints, one tensor at a time."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltaguard import __version__
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import Checkpoint, WeightSource, name_map
from deltaguard.models.mirror import bring_along
from deltaguard.models.shards import DTYPES
from deltaguard.models.writer import CheckpointWriter
from deltaguard.restoration.inputs import Inputs, read_ahead
from deltaguard.restoration.job import open_models
from deltaguard.restoration.plan import Action, Plan, Step, make_plan
from deltaguard.solvers.solution import is_finite
from deltaguard.studies.peers import PEERS, Matrices, Peer, Role


def write_peer(
    method: str,
    *,
    aligned: str | Path,
    finetuned: str | Path,
    output: str | Path,
    strength: float,
    unaligned: str | Path | None = None,
    pretrained: str | Path | None = None,
    safe: str | Path | None = None,
) -> Path:
    """Write the checkpoint that another method makes of a fine-tuned one.

    The output mirrors the fine-tuned checkpoint (for a LoRA adapter: the aligned one), as that of `restore`
    does. What the method does not edit, and what only the fine-tuned model has, such as new rows of the
    vocabulary, stays fine-tuned. A run that was interrupted goes on when it is called again.

    Args:
        method: a name in `PEERS`.
        aligned: the model before fine-tuning: a local folder, a Hub id, or `id@revision`.
        finetuned: the model after it: the same, or a PEFT LoRA adapter folder.
        output: a new or empty folder.
        strength: how much is kept, from the method's `lowest` to 1; see its `dial`.
        unaligned: the aligned model fine-tuned on harmful data, or an adapter over it. This and the others
            below are ignored by methods that do not need them.
        pretrained: the model before alignment.
        safe: the aligned model fine-tuned on safety data, or an adapter over it.

    Returns:
        The folder written.

    Raises:
        DeltaguardError: the method is unknown, the strength out of range, a model is missing or does not fit,
            or the output cannot be written.

    Example:
        >>> write_peer("wise-ft", aligned="a", finetuned="f", output="o", strength=0.3)  # doctest: +SKIP
    """
    given: Mapping[Role, str | Path | None] = {"unaligned": unaligned, "pretrained": pretrained, "safe": safe}
    peer = _known_peer(method, strength)
    base, tuned = open_models(aligned, finetuned)
    plan = make_plan(base, tuned, store=None)
    others: dict[Role, _Other] = {
        role: _open_other(method, role, given[role], aligned, base) for role in peer.needs
    }
    job = _Job(method, peer, strength, base, tuned, others, plan)
    _check_others(job)
    folders = [source.folder for source in (base, tuned, *(other.source for other in others.values()))]
    with CheckpointWriter(output, plan_hash=_plan_hash(job), resume=True, protected=folders) as writer:
        writer.require_space(plan.write_bytes)
        for shard in tuned.shards:
            if writer.finished(shard) is None:
                _write_shard(job, shard, writer)
        bring_along(base, tuned, writer)
        writer.commit(last=tuned.index_name or tuned.shards[0])
    return Path(output)


@dataclass(frozen=True)
class _Other:
    """A further model, and its names of the aligned model's tensors."""

    source: WeightSource
    names: Mapping[str, str]


@dataclass(frozen=True)
class _Job:
    method: str
    peer: Peer
    strength: float
    aligned: Checkpoint
    finetuned: WeightSource
    others: Mapping[Role, _Other]
    plan: Plan

    def edits(self, step: Step) -> str | None:
        """The aligned name of a tensor that the method edits, None of one that stays fine-tuned."""
        if step.action is Action.RESTORE or (
            self.peer.everywhere and DTYPES[step.info.dtype].is_floating_point
        ):
            return step.aligned
        return None


def _known_peer(method: str, strength: float) -> Peer:
    if method not in PEERS:
        raise DeltaguardError(f"There is no method {method!r}; there are {', '.join(PEERS)}.")
    peer = PEERS[method]
    if not peer.lowest <= strength <= 1:
        raise DeltaguardError(
            f"The strength of {method} is {strength}; it must lie in [{peer.lowest:g}, 1] ({peer.dial})."
        )
    return peer


def _open_other(
    method: str, role: Role, reference: str | Path | None, aligned: str | Path, base: Checkpoint
) -> _Other:
    if reference is None:
        needed = " and ".join(PEERS[method].needs)
        raise DeltaguardError(f"{method} needs the {role} model and none was given; it needs {needed}.")
    source = open_models(aligned, reference)[1]
    return _Other(source, name_map(list(base.tensors), list(source.tensors)))


def _check_others(job: _Job) -> None:
    """Refuse, before anything is written, models that lack a tensor or have it in another shape."""
    edited = [name for step in job.plan.steps if (name := job.edits(step))]
    problems: list[str] = []
    for role, other in job.others.items():
        for name in edited:
            shape = job.aligned.tensors[name].shape
            own = other.names.get(name)
            if own is None:
                problems.append(f"Tensor `{name}` is in the aligned model and not in the {role} one.")
            elif (found := other.source.tensors[own].shape) != shape:
                problems.append(
                    f"Tensor `{name}` is {shape} in the aligned model and {found} in the {role} one."
                )
    if problems:
        raise DeltaguardError(listed(f"{job.method} cannot use these models", problems))


def _plan_hash(job: _Job) -> str:
    """What produced a half-written output: it can be gone on with by the same job alone."""
    sources = (job.aligned, job.finetuned, *(other.source for other in job.others.values()))
    parts = [__version__, job.method, repr(job.strength), *(source.fingerprint() for source in sources)]
    parts += [job.finetuned.header(shard).hex() for shard in job.finetuned.shards]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write_shard(job: _Job, shard: str, writer: CheckpointWriter) -> None:
    with writer.shard(shard, job.finetuned.header(shard)) as sink:
        for inputs in read_ahead(job.plan.in_shard(shard), job.aligned, job.finetuned, None):
            info = inputs.step.info
            edited = _edited(job, inputs, DTYPES[info.dtype])
            if edited.is_floating_point() and not is_finite(edited):
                raise DeltaguardError(
                    f"Tensor `{info.name}` would hold NaN or infinite values in {info.dtype} after "
                    f"{job.method}: save the fine-tuned model in bfloat16 or float32, or choose another "
                    "strength."
                )
            sink.write(info.name, edited)


def _edited(job: _Job, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The tensor as it will be written; rows of the vocabulary that only one model has stay as they are."""
    name, tuned = job.edits(inputs.step), inputs.finetuned
    if name is None or inputs.aligned is None:
        return tuned.to(dtype)
    matrix = _as_matrix(tuned)
    rows = slice(inputs.step.shared_rows or len(matrix))
    conv1d = inputs.step.transposed and not job.peer.everywhere

    def prepared(tensor: Tensor) -> Tensor:
        part = _as_matrix(tensor)[rows]
        return part.T if conv1d else part

    others: dict[Role, Tensor] = {
        role: prepared(other.source.read(other.names[name])) for role, other in job.others.items()
    }
    given = Matrices(prepared(inputs.aligned), prepared(tuned), others)
    try:
        weight = job.peer.edit(given, job.strength)
    except ValueError as error:
        raise DeltaguardError(f"Tensor `{inputs.step.info.name}`: {error}") from error
    result = matrix.to(dtype, copy=True)
    result[rows] = (weight.T if conv1d else weight).to(dtype)
    return result.reshape(tuned.shape)


def _as_matrix(tensor: Tensor) -> Tensor:
    """A view with one row per entry of the first dimension; what is no matrix is edited entry by entry."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
