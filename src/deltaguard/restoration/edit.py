"""One tensor of a restore: its solver run, its row of the report."""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaguard.errors import DeltaguardError
from deltaguard.models.shards import DTYPES
from deltaguard.reports.records.restore import LayerRow, OtherRow
from deltaguard.restoration.curvature import Spectra
from deltaguard.restoration.inputs import Inputs, LayerDelta, Thin, Unchanged
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Step
from deltaguard.solvers import (
    Factor,
    LowRank,
    Outcome,
    Projection,
    Solution,
    ThinProjection,
    greedy_factored,
    interpolate,
    low_rank,
    low_rank_of_factors,
    outcome_of,
    project,
    project_thin,
    published,
    solve_projected,
)
from deltaguard.solvers.solution import check_matrices, is_finite, working_dtype

_UNCHANGED = Outcome(kept_energy=1.0, safety_cost=0.0, utility_loss=0.0, detail={"delta_norm": 0.0})


@dataclass(frozen=True)
class Edited:
    """A tensor as it will be written, and its row of the report."""

    tensor: Tensor
    row: LayerRow | OtherRow


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


def projection_of(inputs: LayerDelta) -> Projection | ThinProjection | None:
    """A layer's delta in the eigenbases of its curvature, None where there is no delta.

    Raises:
        DeltaguardError: the weights are not finite, or the curvature is damaged. It names the tensor.
    """
    if isinstance(inputs, Unchanged) or not isinstance(inputs.curvature, Spectra):
        return None
    try:
        return (
            _projected_thin(inputs)
            if isinstance(inputs, Thin)
            else _projected(*inputs.pair, inputs.curvature, inputs.thin)
        )
    except ValueError as error:
        raise named(error, inputs.step) from error


def named(error: ValueError, step: Step) -> DeltaguardError:
    """Say which tensor a solver failed on."""
    return DeltaguardError(f"Tensor `{step.info.name}`: {error}")


def _projected_thin(thin: Thin) -> ThinProjection:
    delta, spectra = thin.delta, thin.curvature
    if not (is_finite(delta.up) and is_finite(delta.down)):
        raise ValueError("The adapter's matrices hold entries that are NaN or infinite.")
    return project_thin(delta.up, delta.down, spectra.inputs, spectra.outputs)


def _projected(
    aligned: Tensor, finetuned: Tensor, spectra: Spectra, thin: Thin | None
) -> Projection | ThinProjection:
    check_matrices(aligned, finetuned)
    if thin is not None:
        return _projected_thin(thin)
    dtype = working_dtype(aligned, finetuned)
    return project(finetuned.to(dtype) - aligned.to(dtype), spectra.inputs, spectra.outputs)


def factors_of(inputs: LayerDelta, config: RestoreConfig, mu: float | None) -> tuple[LowRank, LayerRow]:
    """A layer's restored delta as the factors of an adapter, in the precision in which they are stored.

    Args:
        inputs: what the step needs; its action is RESTORE.
        config: the restore's options.
        mu: the price of safety, for the methods that have one.

    Raises:
        DeltaguardError: as `edit`.
    """
    started = time.perf_counter()
    dtype = inputs.pair[0].dtype if isinstance(inputs, Inputs) else DTYPES[inputs.step.info.dtype]
    found, outcome = _factors(inputs, config, mu)
    factors = LowRank(found.down.to(dtype), found.up.to(dtype), found.residual)
    numbers = {"adapter_rank": len(factors.down), "adapter_residual": factors.residual}
    row = _row(inputs.step, replace(outcome, detail={**outcome.detail, **numbers}), started)
    return factors, row


def _factors(inputs: LayerDelta, config: RestoreConfig, mu: float | None) -> tuple[LowRank, Outcome]:
    if isinstance(inputs, Thin):
        return _thin_factors(inputs, config.adapter_rank, mu)
    if isinstance(inputs, Unchanged) or not inputs.differs:
        rows, columns = inputs.step.matrix_shape
        return LowRank(torch.zeros(0, columns), torch.zeros(rows, 0), 0.0), _UNCHANGED
    solution = _solved(inputs, config, mu)
    delta = solution.weight.float() - inputs.pair[0].float()
    return low_rank(delta, rank=config.adapter_rank), solution


def _thin_factors(thin: Thin, rank: int | None, mu: float | None) -> tuple[LowRank, Outcome]:
    assert mu is not None, "a method that projects has a price"  # noqa: S101
    try:
        projection = _projected_thin(thin)
        product = projection.factors(mu)
        if product is None:
            found = low_rank(projection.restored(mu), rank=rank)
        else:
            found = low_rank_of_factors(product.up, product.down, rank=rank)
            projection.directions.check_restored(_norm(found))
        return found, outcome_of(projection, mu)
    except ValueError as error:
        raise named(error, thin.step) from error


def _norm(found: LowRank) -> float:
    """‖up @ down‖ of factors with orthogonal columns and rows, as `low_rank` gives them."""
    return math.sqrt(float((found.up.double().square().sum(0) * found.down.double().square().sum(1)).sum()))


def _restore(inputs: Inputs, config: RestoreConfig, mu: float | None, dtype: torch.dtype) -> Edited:
    started = time.perf_counter()
    if config.output_format == "adapter":
        factors, row = factors_of(inputs.thin or inputs, config, mu)
        weight = torch.addmm(inputs.pair[0].float(), factors.up.float(), factors.down.float())
    else:
        solution = _solved(inputs, config, mu)
        weight, row = solution.weight, _row(inputs.step, solution, started)
    restored = weight.T if inputs.step.transposed else weight
    return Edited(restored.to(dtype).contiguous(), row)


def _solved(inputs: Inputs, config: RestoreConfig, mu: float | None) -> Solution:
    if not inputs.differs:
        return Solution(weight=inputs.pair[1], **vars(_UNCHANGED))
    try:
        return _solve(inputs, config, mu)
    except ValueError as error:
        raise named(error, inputs.step) from error


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


def _row(step: Step, outcome: Outcome, started: float) -> LayerRow:
    own = dict(outcome.detail)
    return LayerRow(
        name=step.info.name,
        shape=step.info.shape,
        delta_norm=own.pop("delta_norm"),
        kept_energy=outcome.kept_energy,
        kept_entries=outcome.kept_entries,
        safety_cost=None if math.isnan(outcome.safety_cost) else outcome.safety_cost,
        utility_loss=outcome.utility_loss,
        seconds=time.perf_counter() - started,
        detail=own,
    )
