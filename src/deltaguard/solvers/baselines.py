"""Methods that know no curvature."""

import math

import torch
from torch import Tensor

from deltaguard.solvers.solution import (
    Solution,
    check_matrices,
    is_finite,
    row_blocks,
    squared_norm,
    working_dtype,
)


def interpolate(aligned: Tensor, finetuned: Tensor, *, alpha: float) -> Solution:
    """Interpolate between the aligned and the fine-tuned weight (WiSE-FT; Wortsman et al., 2022).

    Args:
        aligned: aligned weight, any shape (out, in).
        finetuned: fine-tuned weight of the same shape.
        alpha: share of the delta that is kept, in [0, 1]; both ends are exact.

    Returns:
        aligned + alpha · delta. `kept_energy` is alpha, `safety_cost` NaN: no curvature is known.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or alpha is outside [0, 1].

    Example:
        >>> import torch
        >>> interpolate(torch.zeros(1, 1), torch.ones(1, 1), alpha=0.25).weight.item()
        0.25
    """
    check_matrices(aligned, finetuned)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1].")
    dtype = working_dtype(aligned, finetuned)
    weight = torch.empty(aligned.shape, dtype=dtype, device=aligned.device)
    norm = 0.0
    for rows in row_blocks(aligned):
        base, target = aligned[rows].to(dtype), finetuned[rows].to(dtype)
        norm += squared_norm(target - base)
        torch.lerp(base, target, alpha, out=weight[rows])
    return Solution(
        weight=weight,
        kept_energy=alpha,
        safety_cost=math.nan,
        utility_loss=(1 - alpha) ** 2,
        detail={"delta_norm": math.sqrt(norm)},
    )


def resta(finetuned: Tensor, safety_vector: Tensor, *, gamma: float) -> Tensor:
    """Add a safety vector: task arithmetic (RESTA; Bhardwaj et al., ACL 2024, arXiv:2402.11746).

    The paper's plain variant; its other one first drops and rescales entries of the delta (DARE).

    Args:
        finetuned: fine-tuned weight, any shape.
        safety_vector: aligned - unaligned weight of the same shape, where the unaligned model is the aligned
            one after fine-tuning on harmful data.
        gamma: the paper's γ, how much of the vector is added; 0 gives the fine-tuned weight exactly.

    Returns:
        finetuned + gamma · safety_vector, in the working precision. Not a `Solution`: without the aligned
        weight, what is kept of the delta cannot be said.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or gamma is negative or not finite.

    Example:
        >>> import torch
        >>> resta(torch.ones(2), torch.tensor([0.0, -2.0]), gamma=0.5).tolist()
        [1.0, 0.0]
    """
    if finetuned.shape != safety_vector.shape:
        raise ValueError(
            f"The fine-tuned weight is {tuple(finetuned.shape)} and the safety vector "
            f"{tuple(safety_vector.shape)}: the same shape is needed."
        )
    if not (is_finite(finetuned) and is_finite(safety_vector)):
        raise ValueError("The fine-tuned weight or the safety vector holds NaN or infinite entries.")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma}; it must lie in [0, infinity).")
    dtype = working_dtype(finetuned, safety_vector)
    return torch.add(finetuned.to(dtype), safety_vector.to(dtype), alpha=gamma)
