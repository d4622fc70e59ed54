"""The routine that the authors of Safe Delta released, which differs from their paper.

Written from a description of what it computes: it walks through blocks of columns, selects within each
block on the weights as already compensated, and pushes the error of each change into later columns.
"""

import math

import torch
from torch import Tensor

from deltaguard.solvers.solution import (
    Solution,
    check_hessian,
    check_matrices,
    share,
    squared_norm,
    working_dtype,
)

SUB_BLOCK = 4
"""Columns whose errors are pushed on together."""

NEVER_KEPT = 0.15
"""Share of a block's entries, the most costly ones, that never take the fine-tuned value."""

REFERENCE_ROWS = 4096
"""The budget of a block is stated for a matrix of this many rows."""


def published(
    aligned: Tensor,
    finetuned: Tensor,
    hessian: Tensor,
    *,
    strength: float,
    block_size: int = 2048,
    dampening: float = 0.01,
) -> Solution:
    """Run the released Safe Delta routine, for comparison with published numbers.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight, (out, in).
        hessian: H, (in, in); its scale matters only where a column is dead (H_jj = 0, replaced by 1).
        strength: the paper's s, at least 0; 0 gives the aligned weight. The largest strength keeps 85 %
            of the entries of a block, never all of them.
        block_size: columns that are selected together.
        dampening: share of the mean diagonal of H that is added to its diagonal.

    Entries of one column have the same priority. The released routine leaves their order to an unstable
    sort, and so does this one, because users compare with its numbers: which rows of the boundary column
    are kept can differ between processors.

    Returns:
        The restored weight; `safety_cost` is under the H given, undamped.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, an option is out of range, or the damped H
            is not positive definite.

    Example:
        >>> import torch
        >>> a, f = torch.zeros(2, 3), torch.ones(2, 3)
        >>> torch.equal(published(a, f, torch.eye(3), strength=0.0).weight, a)
        True
    """
    check_matrices(aligned, finetuned)
    check_hessian(hessian, aligned.shape[1])
    if not strength >= 0 or block_size < 1 or not dampening > 0:
        raise ValueError(
            f"strength is {strength}, block_size {block_size}, dampening {dampening}: "
            "strength must not be negative, the others must be positive."
        )
    dtype = working_dtype(aligned, finetuned, hessian)
    target, weight = finetuned.to(dtype), aligned.to(dtype, copy=True)
    upper = _inverse_factor(hessian.to(dtype), dampening)
    kept = 0
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        block = upper[start:stop, start:stop]
        mask = _select(weight[:, start:stop], target[:, start:stop], block.diagonal(), strength)
        errors = _push_within(weight[:, start:stop], target[:, start:stop], mask, block)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
        kept += int(mask.sum())
    return _describe(weight, aligned.to(dtype), target, hessian.to(dtype), kept)


def _inverse_factor(hessian: Tensor, dampening: float) -> Tensor:
    """Factorise H⁻¹ = Uᵀ U, H damped and its dead columns given a unit diagonal."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += dampening * diagonal.mean()
    lower, info = torch.linalg.cholesky_ex(damped)
    if not int(info):
        # Where H is all but singular, its inverse may fail where it did not.
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(info):
            return upper
    raise ValueError(f"The curvature is not positive definite with dampening {dampening:g}; raise it.")


def _select(weight: Tensor, target: Tensor, d: Tensor, strength: float) -> Tensor:
    """Mask the entries that take the fine-tuned value; boolean, like `weight`."""
    priority = d.square().reciprocal()
    costs = ((target - weight).square() * priority).flatten()
    # Not stable, as released: the rows of the boundary column come in the order of torch's own sort.
    order = torch.sort(priority.expand_as(weight).flatten(), stable=False).indices
    order = order[: costs.numel() - int(NEVER_KEPT * costs.numel())]
    budget = priority.mean() * (strength / 2) * (weight.shape[0] / REFERENCE_ROWS)
    within = int((costs[order].cumsum(0) <= budget).sum())
    mask = torch.zeros_like(costs, dtype=torch.bool)
    mask[order[:within]] = True
    return mask.view_as(weight)


def _push_within(weight: Tensor, target: Tensor, mask: Tensor, upper: Tensor) -> Tensor:
    """Apply a block's selection in place, pushing errors to its later columns; return the scaled errors."""
    errors = torch.empty_like(weight)
    d = upper.diagonal()
    for start in range(0, weight.shape[1], SUB_BLOCK):
        columns = slice(start, min(start + SUB_BLOCK, weight.shape[1]))
        changed = torch.where(mask[:, columns], target[:, columns], weight[:, columns])
        errors[:, columns] = (weight[:, columns] - changed) / d[columns]
        weight[:, columns] = changed
        weight[:, columns.stop :] -= errors[:, columns] @ upper[columns, columns.stop :]
    return errors


def _describe(weight: Tensor, aligned: Tensor, target: Tensor, hessian: Tensor, kept: int) -> Solution:
    delta, restored = target - aligned, weight - aligned
    norm = squared_norm(delta)
    before = float(((delta @ hessian) * delta).sum())
    after = float(((restored @ hessian) * restored).sum())
    return Solution(
        weight=weight,
        kept_energy=share(float((restored * delta).sum(dtype=torch.float64)), norm),
        kept_entries=kept / weight.numel(),
        safety_cost=share(after, before),
        utility_loss=share(squared_norm(restored - delta), norm),
        detail={"delta_norm": math.sqrt(norm)},
    )
