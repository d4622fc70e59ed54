"""What a restore will do, decided from headers alone: no weight is read to make a plan."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from math import prod

from deltaguard.curvature import Rank
from deltaguard.curvature.contents import spectra_bytes
from deltaguard.curvature.leaning import leaning_bytes
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.sums import LayerGroup
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import TensorInfo, WeightSource, name_map
from deltaguard.models.experts import refuse_unknown_experts
from deltaguard.models.families import (
    is_block_matrix,
    is_input_embedding,
    is_output_head,
    is_stack,
    is_vocabulary,
    stored_in_out,
)
from deltaguard.models.loading import vocabulary_size
from deltaguard.models.shards import DTYPES
from deltaguard.restoration.absent import LayerRule, find_absent
from deltaguard.restoration.options import OtherParams

_ORDERS = {False: "(out, in)", True: "(in, out)"}
_SHOWN = 20


class Action(StrEnum):
    """What becomes of one tensor of the fine-tuned checkpoint."""

    RESTORE = "restore"
    ALIGNED = "aligned"
    FINETUNED = "finetuned"
    EXTEND = "extend"


@dataclass(frozen=True)
class Step:
    """One tensor of the output.

    Attributes:
        info: the tensor as the fine-tuned checkpoint declares it; the output declares it alike.
        action: RESTORE: a solver decides; ALIGNED or FINETUNED: taken whole from that model; EXTEND: the
            rows both models have from the aligned one, the rest from the fine-tuned one.
        aligned: the tensor's name in the aligned checkpoint, None where it has none.
        shared_rows: with EXTEND, how many rows come from the aligned model; with RESTORE, how many the method
            decides, the others being fine-tuned; 0 where it decides all.
        group: the curvature group, None without curvature; of a stack, what its groups' names begin with.
        transposed: whether the weight is stored (in, out), as GPT-2's Conv1D does.
        reason: why, in words for the report.
        experts: how many matrices the tensor stacks, which the method decides one by one; 0 where it is one.
    """

    info: TensorInfo
    action: Action
    aligned: str | None
    group: str | None
    transposed: bool
    reason: str
    shared_rows: int = 0
    experts: int = 0

    @property
    def groups(self) -> tuple[str, ...]:
        """The curvature group of each matrix, none without curvature."""
        return self._of_each(self.group) if self.group else ()

    @property
    def keys(self) -> tuple[str, ...]:
        """What the curvature store calls each matrix."""
        return self._of_each(self.aligned_name)

    def _of_each(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{expert}" for expert in range(self.experts)) if self.experts else (name,)

    @property
    def aligned_name(self) -> str:
        """The name in the aligned checkpoint of a tensor that has one."""
        assert self.aligned is not None, "a tensor that is restored has an aligned counterpart"  # noqa: S101
        return self.aligned

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of a matrix that a method is given, see `Layer`: of a vector, a column."""
        shape = self.info.shape[1:] if self.experts else self.info.shape
        rows, columns = shape if len(shape) == 2 else _column(shape)
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Plan:
    """All steps, in the order in which the tensors lie in the fine-tuned checkpoint's shards.

    Attributes:
        steps: one per tensor of the output.
        absent: parameters of the aligned checkpoint that the fine-tuned one, and so the output, does without.
        read_bytes: bytes of weights that will be read from both checkpoints.
        write_bytes: bytes of weights that will be written.
        curvature_bytes: bytes that will be read from the store.
        peak_bytes: estimate of the memory that tensors will take at once.
    """

    steps: tuple[Step, ...]
    absent: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    curvature_bytes: int
    peak_bytes: int

    def count(self, *actions: Action) -> int:
        """Count the tensors that take one of these actions."""
        return sum(step.action in actions for step in self.steps)

    def in_shard(self, shard: str) -> tuple[Step, ...]:
        """List the steps of one shard, by offset."""
        return tuple(step for step in self.steps if step.info.shard == shard)


def make_plan(
    aligned: WeightSource,
    finetuned: WeightSource,
    *,
    store: CurvatureStore | None,
    other_params: OtherParams = "aligned",
    rank: Rank = "auto",
    everywhere: bool = False,
) -> Plan:
    """Decide what becomes of every tensor of the fine-tuned checkpoint.

    Args:
        aligned: the aligned checkpoint.
        finetuned: the fine-tuned checkpoint; the output mirrors it.
        store: the aligned model's curvature, whose layers are restored; None where the method needs
            none: then every matrix inside a decoder block is restored.
        other_params: where norms, biases, embeddings and the output head come from.
        rank: what the method reads from the store: eigenpairs, or the whole.
        everywhere: whether the method decides every tensor that both models have; what the fine-tuned model
            alone has then stays.

    Returns:
        The plan.

    Raises:
        DeltaguardError: the checkpoints are not of one architecture (the first mismatches are listed and the
            others counted), or the model has experts in a form that is not known.
    """
    for source in (aligned, finetuned):
        refuse_unknown_experts(source.reference, source.config, source.tensors)
    names = _aligned_names(aligned, finetuned)
    known_tokens = _known_tokens(aligned, finetuned)
    rules = _Rules(_layer_rule(aligned, store), other_params, known_tokens, everywhere)
    absent, problems = find_absent(aligned, names, rules.layer)
    steps: list[Step] = []
    for info in finetuned.tensors.values():
        own = names.get(info.name)
        step = _step(info, None if own is None else aligned.tensors[own], rules)
        if isinstance(step, str):
            problems.append(step)
        else:
            steps.append(step)
    if problems:
        raise DeltaguardError(_mismatch(aligned, finetuned, problems))
    if not any(step.action is Action.RESTORE for step in steps):
        raise DeltaguardError(
            f"No layer of {finetuned.reference} can be restored: no numbered decoder block holds a matrix."
        )
    return _with_sizes(tuple(steps), absent, aligned, store, rank)


@dataclass(frozen=True)
class _Rules:
    """What decides over a tensor besides its headers."""

    layer: LayerRule
    other_params: OtherParams
    known_tokens: int | None
    everywhere: bool


def _layer_rule(aligned: WeightSource, store: CurvatureStore | None) -> LayerRule:
    """(curvature group, transposed) of an aligned tensor that is to be restored, None for the others."""
    if store is not None:
        _refuse_turned_layers(aligned, store)

    def rule(info: TensorInfo) -> tuple[str | None, bool] | None:
        transposed = stored_in_out(aligned.config, info.name)
        stack = is_stack(info.name, info.shape)
        if store is None:
            return (None, transposed) if stack or is_block_matrix(info.name, info.shape) else None
        if stack:
            known = all(store.group_of(f"{info.name}.{expert}") for expert in range(info.shape[0]))
            return (info.name, transposed) if known else None
        group = store.group_of(info.name)
        return None if group is None else (group.name, transposed)

    return rule


def _refuse_turned_layers(aligned: WeightSource, store: CurvatureStore) -> None:
    turned = [
        f"`{layer.tensor}`, which the store has as {_ORDERS[layer.transposed]}, and models of type "
        f"{aligned.config.get('model_type')} as {_ORDERS[not layer.transposed]}"
        for group in store.groups
        for layer in group.layers
        if layer.transposed != stored_in_out(aligned.config, layer.tensor)
    ]
    if turned:
        raise DeltaguardError(
            listed(f"The curvature store {store.folder} has weights of {aligned.reference} turned", turned)
            + f"\nRun `deltaguard calibrate {aligned.reference} -o STORE` anew, or correct `model_type` in "
            "the model's config.json."
        )


def _aligned_names(aligned: WeightSource, finetuned: WeightSource) -> Mapping[str, str]:
    """Fine-tuned name -> aligned name; an output head that only one model stores is the tied embedding."""
    names = name_map(list(finetuned.tensors), list(aligned.tensors))
    embedding = next(filter(is_input_embedding, aligned.tensors), None)
    for name in finetuned.tensors:
        if name not in names and embedding and is_output_head(name):
            names[name] = embedding
    return names


def _step(  # noqa: PLR0911  # a return for each thing that may become of a tensor
    info: TensorInfo, aligned: TensorInfo | None, rules: _Rules
) -> Step | str:
    """Say what becomes of one tensor, or the sentence that says why it does not fit."""
    if aligned is None:
        if is_block_matrix(info.name, info.shape):
            return f"Tensor `{info.name}` {info.shape} is in the fine-tuned model and not in the aligned one."
        return Step(info, Action.FINETUNED, None, None, False, "only in the fine-tuned checkpoint")
    restored = rules.layer(aligned)
    same = info.shape == aligned.shape
    if restored is not None and same:
        experts = info.shape[0] if is_stack(info.name, info.shape) else 0
        return Step(info, Action.RESTORE, aligned.name, *restored, "restored", experts=experts)
    shared = _shared_rows(info, aligned, rules.known_tokens)
    if restored is not None or (shared is None and not same):
        return (
            f"Tensor `{info.name}` is {aligned.shape} in the aligned model "
            f"and {info.shape} in the fine-tuned one.{_as_before(info, aligned)}"
        )
    if rules.everywhere:
        # Indices and masks are no weights.
        action = Action.RESTORE if DTYPES[info.dtype].is_floating_point else Action.FINETUNED
        return Step(info, action, aligned.name, None, False, "decided by the method", shared or 0)
    if shared is None or rules.other_params == "finetuned":
        own = f"--other-params {rules.other_params}"
        return Step(info, Action(rules.other_params), aligned.name, None, False, own)
    extra = f"rows from {shared} on only in the fine-tuned vocabulary"
    return Step(info, Action.EXTEND, aligned.name, None, False, extra, shared)


def _shared_rows(info: TensorInfo, aligned: TensorInfo, known_tokens: int | None) -> int | None:
    """How many rows of a vocabulary tensor both models know, None where the fine-tuned one has no more."""
    if not is_vocabulary(info.name) or info.shape[1:] != aligned.shape[1:]:
        return None
    rows, own = info.shape[0], aligned.shape[0]
    shared = own if known_tokens is None else min(own, known_tokens)
    return shared if rows >= own and shared < rows and (rows > own or known_tokens is not None) else None


def _as_before(info: TensorInfo, aligned: TensorInfo) -> str:
    """Say how a vocabulary that was cut down gets its rows back; nothing of another tensor."""
    rows = aligned.shape[0]
    if not is_vocabulary(info.name) or info.shape[1:] != aligned.shape[1:] or info.shape[0] > rows:
        return ""
    return (
        f" Give it the rows back: `model.resize_token_embeddings({rows})`, then `model.save_pretrained(...)`."
    )


def _known_tokens(aligned: WeightSource, finetuned: WeightSource) -> int | None:
    """Find the size of the aligned vocabulary where the fine-tuned tokenizer knows more tokens, else None.

    New tokens may lie in rows that the aligned model has as padding: shapes alone do not show them.
    """
    own, tuned = (vocabulary_size(source.folder) for source in (aligned, finetuned))
    return own if own is not None and tuned is not None and tuned > own else None


def _mismatch(aligned: WeightSource, finetuned: WeightSource, problems: Sequence[str]) -> str:
    types = [str(source.config.get("model_type", "unknown")) for source in (aligned, finetuned)]
    lines = [
        f"{aligned.reference} ({types[0]}) and {finetuned.reference} ({types[1]}) are not one architecture:"
    ]
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  and {len(problems) - _SHOWN} more.")
    lines.append(f"Run `deltaguard diff {aligned.reference} {finetuned.reference}` to see all differences.")
    return "\n".join(lines)


def _with_sizes(
    steps: tuple[Step, ...],
    absent: tuple[str, ...],
    aligned: WeightSource,
    store: CurvatureStore | None,
    rank: Rank,
) -> Plan:
    read = sum(step.info.nbytes for step in steps)
    read += sum(aligned.tensors[step.aligned].nbytes for step in steps if step.aligned)
    used = {group for step in steps for group in step.groups}
    curvature = (
        {g.name: _curvature_bytes(store, g, rank) for g in store.groups if g.name in used} if store else {}
    )
    entries = max(_entries(step) for step in steps if step.action is Action.RESTORE)
    largest = max(step.info.nbytes for step in steps)
    # Two tensors in flight, eight float32 matrices of the layer's shape; of the curvature of all its matrices
    # a copy in float32, and what was read of it and of other layers that share theirs.
    own = max((sum(curvature[group] for group in step.groups) for step in steps if curvature), default=0)
    peak = 4 * largest + 4 * 8 * entries + 2 * own + held_curvature(steps, curvature)
    return Plan(
        steps=steps,
        absent=absent,
        read_bytes=read,
        write_bytes=sum(step.info.nbytes for step in steps),
        curvature_bytes=sum(curvature.values()),
        peak_bytes=peak,
    )


def held_curvature(steps: Sequence[Step], sizes: Mapping[str, int]) -> int:
    """Find how much curvature is held at most: from the first layer of a shard that shares it to the last.

    Args:
        steps: in their order.
        sizes: bytes of each group's curvature.
    """
    most = 0
    for _, in_shard in groupby(steps, key=lambda step: step.info.shard):
        own = list(in_shard)
        uses = Counter(group for step in own for group in step.groups if group in sizes)
        held: set[str] = set()
        size = 0
        for step in own:
            new = {group for group in step.groups if group in sizes} - held
            held |= new
            size += sum(sizes[group] for group in new)
            most = max(most, size)
            for group in step.groups:
                uses[group] -= 1
                if group in held and not uses[group]:
                    held.remove(group)
                    size -= sizes[group]
    return most


def _curvature_bytes(store: CurvatureStore, group: LayerGroup, rank: Rank) -> int:
    if rank == "full":
        return 4 * group.in_features**2
    leaning = store.knows_leaning and store.reached(group.name) is None
    return spectra_bytes(group, store.provenance.extent) + (leaning_bytes(group) if leaning else 0)


def _column(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1), prod(shape[1:])


def _entries(step: Step) -> int:
    return prod(step.info.shape)
