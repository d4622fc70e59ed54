"""One tensor of a restore: its inputs read, its solver run, its row of the report."""

import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaguard.checkpoints.adapter import AdapterCheckpoint, ThinDelta
from deltaguard.checkpoints.checkpoint import WeightSource
from deltaguard.errors import DeltaguardError
from deltaguard.report.restore import LayerRow, OtherRow
from deltaguard.restoration.curvature import Curvature, CurvatureReader, Spectra
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Step
from deltaguard.solvers import (
    Factor,
    LowRank,
    Projection,
    Solution,
    ThinProjection,
    greedy_factored,
    interpolate,
    low_rank,
    low_rank_of_factors,
    project,
    project_thin,
    published,
    solve_projected,
)
from deltaguard.solvers.solution import check_matrices, is_finite, working_dtype


@dataclass(frozen=True)
class Inputs:
    """What one step needs, read from disk.

    Attributes:
        step: the step of the plan.
        finetuned: the fine-tuned tensor.
        aligned: the aligned tensor, None where the aligned model has none.
        differs: whether the two tensors differ; True where there is no aligned one.
        curvature: what the method needs, None where it needs none.
        thin: the delta as a product, where it will be projected and an adapter holds it as one.
    """

    step: Step
    finetuned: Tensor
    aligned: Tensor | None
    differs: bool
    curvature: Curvature | None
    thin: ThinDelta | None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The aligned and the fine-tuned weight, each (out, in)."""
        aligned = self.aligned
        assert aligned is not None, "a tensor that is restored has an aligned counterpart"  # noqa: S101
        return (aligned.T, self.finetuned.T) if self.step.transposed else (aligned, self.finetuned)


@dataclass(frozen=True)
class Edited:
    """A tensor as it will be written, and its row of the report."""

    tensor: Tensor
    row: LayerRow | OtherRow


def read_ahead(
    steps: Iterable[Step],
    aligned: WeightSource,
    finetuned: WeightSource,
    curvature: CurvatureReader | None,
) -> Iterator[Inputs]:
    """The inputs of each step, read in a thread while the step before is being solved.

    At most two steps' tensors are in memory at once.
    """

    def read(step: Step) -> Inputs:
        tuned = finetuned.read(step.info.name)
        base = aligned.read(step.aligned) if step.aligned else None
        differs = base is None or not _same(base, tuned)
        known = curvature.take(step, needed=differs) if curvature else None
        thin = None
        if isinstance(known, Spectra) and isinstance(finetuned, AdapterCheckpoint):
            thin = finetuned.thin_delta(step.info.name)
        return Inputs(step, finetuned=tuned, aligned=base, differs=differs, curvature=known, thin=thin)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        pending = None
        for step in steps:
            following = reader.submit(read, step)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def edit(inputs: Inputs, config: RestoreConfig, mu: float | None, dtype: torch.dtype) -> Edited:
    """Carry out one step.

    Args:
        inputs: what the step needs.
        config: the restore's options.
        mu: the price of safety, for the methods that have one.
        dtype: dtype of the output tensor.

    Returns:
        The tensor to write, contiguous, and its row.

    Raises:
        DeltaguardError: the weights are not finite, or the solver failed; the message names the tensor.
    """
    restored = inputs.step.action is Action.RESTORE
    edited = _restore(inputs, config, mu, dtype) if restored else _take(inputs, dtype)
    if edited.tensor.is_floating_point() and not is_finite(edited.tensor):
        raise DeltaguardError(
            f"Tensor `{inputs.step.info.name}` would hold NaN or infinite values in {dtype}. If they are not "
            "in the fine-tuned model already, save that in bfloat16 or float32 and restore again."
        )
    return edited


def projection_of(inputs: Inputs) -> Projection | ThinProjection | None:
    """A layer's delta in the eigenbases of its curvature, None where there is no delta.

    Raises:
        DeltaguardError: the weights are not finite; the message names the tensor.
    """
    spectra = inputs.curvature
    if not isinstance(spectra, Spectra):
        return None
    aligned, finetuned = inputs.pair
    try:
        return _projected(aligned, finetuned, spectra, inputs.thin)
    except ValueError as error:
        raise DeltaguardError(f"Tensor `{inputs.step.info.name}`: {error}") from error


def _projected(
    aligned: Tensor, finetuned: Tensor, spectra: Spectra, thin: ThinDelta | None
) -> Projection | ThinProjection:
    check_matrices(aligned, finetuned)
    if thin is not None:
        return project_thin(thin.up, thin.down, spectra.inputs, spectra.outputs)
    dtype = working_dtype(aligned, finetuned)
    return project(finetuned.to(dtype) - aligned.to(dtype), spectra.inputs, spectra.outputs)


def _same(one: Tensor, other: Tensor) -> bool:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.to(dtype), other.to(dtype))


def factors_of(inputs: Inputs, config: RestoreConfig, mu: float | None) -> tuple[LowRank, LayerRow]:
    """A layer's restored delta as the factors of an adapter, in the precision in which they are stored.

    Args:
        inputs: what the step needs; its action is RESTORE.
        config: the restore's options.
        mu: the price of safety, for the methods that have one.

    Raises:
        DeltaguardError: as `edit`.
    """
    started = time.perf_counter()
    solution = _solved(inputs, config, mu)
    thin, rank = solution.factors, config.adapter_rank
    if thin is None:
        found = low_rank(solution.weight.float() - inputs.pair[0].float(), rank=rank)
    else:
        found = low_rank_of_factors(thin.up, thin.down, rank=rank)
    dtype = inputs.pair[0].dtype
    factors = LowRank(found.down.to(dtype), found.up.to(dtype), found.residual)
    numbers = {"adapter_rank": float(len(factors.down)), "adapter_residual": factors.residual}
    row = _row(inputs.step, replace(solution, detail={**solution.detail, **numbers}), started)
    return factors, row


def _restore(inputs: Inputs, config: RestoreConfig, mu: float | None, dtype: torch.dtype) -> Edited:
    started = time.perf_counter()
    if config.output_format == "adapter":
        factors, row = factors_of(inputs, config, mu)
        weight = torch.addmm(inputs.pair[0].float(), factors.up.float(), factors.down.float())
    else:
        solution = _solved(inputs, config, mu)
        weight, row = solution.weight, _row(inputs.step, solution, started)
    restored = weight.T if inputs.step.transposed else weight
    return Edited(restored.to(dtype).contiguous(), row)


def _solved(inputs: Inputs, config: RestoreConfig, mu: float | None) -> Solution:
    if not inputs.differs:
        return Solution(
            weight=inputs.pair[1],
            kept_fraction=1.0,
            safety_cost=0.0,
            utility_loss=0.0,
            detail={"delta_norm": 0.0},
        )
    try:
        return _solve(inputs, config, mu)
    except ValueError as error:
        raise DeltaguardError(f"Tensor `{inputs.step.info.name}`: {error}") from error


def _solve(inputs: Inputs, config: RestoreConfig, mu: float | None) -> Solution:
    aligned, finetuned = inputs.pair
    strength, curvature = config.chosen_strength, inputs.curvature
    if isinstance(curvature, Spectra) and mu is not None:
        projection = _projected(aligned, finetuned, curvature, inputs.thin)
        return solve_projected(aligned, finetuned, projection, mu=mu)
    if isinstance(curvature, Factor):
        return greedy_factored(
            aligned,
            finetuned,
            curvature,
            strength=strength,
            budget=config.budget,
            compensation=config.compensation,
        )
    if isinstance(curvature, Tensor):
        return published(aligned, finetuned, curvature, strength=strength)
    return interpolate(aligned, finetuned, alpha=strength)


def _take(inputs: Inputs, dtype: torch.dtype) -> Edited:
    step, finetuned = inputs.step, inputs.finetuned
    if inputs.aligned is None:
        row = OtherRow(name=step.info.name, source="finetuned", reason=step.reason, differs=True)
        return Edited(finetuned.to(dtype), row)
    aligned = inputs.aligned.to(dtype)
    if step.action is Action.EXTEND:
        tensor = finetuned.to(dtype, copy=True)
        tensor[: step.shared_rows] = aligned[: step.shared_rows]
        row = OtherRow(name=step.info.name, source="both", reason=step.reason, differs=True)
        return Edited(tensor, row)
    from_aligned = step.action is Action.ALIGNED
    row = OtherRow(
        name=step.info.name,
        source="aligned" if from_aligned else "finetuned",
        reason=step.reason,
        differs=inputs.differs,
    )
    return Edited(aligned if from_aligned else finetuned.to(dtype), row)


def _row(step: Step, solution: Solution, started: float) -> LayerRow:
    own = dict(solution.detail)
    return LayerRow(
        name=step.info.name,
        shape=step.info.shape,
        delta_norm=own.pop("delta_norm"),
        kept_fraction=solution.kept_fraction,
        safety_cost=None if math.isnan(solution.safety_cost) else solution.safety_cost,
        utility_loss=solution.utility_loss,
        seconds=time.perf_counter() - started,
        detail=own,
    )
