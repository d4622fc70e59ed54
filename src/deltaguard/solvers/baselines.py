"""Methods that know no curvature."""

import math

import torch
from torch import Tensor

from deltaguard.solvers.solution import Solution, check_matrices, row_blocks, squared_norm, working_dtype


def interpolate(aligned: Tensor, finetuned: Tensor, *, alpha: float) -> Solution:
    """Weights between the aligned and the fine-tuned ones (WiSE-FT; Wortsman et al., 2022).

    Args:
        aligned: aligned weight, any shape (out, in).
        finetuned: fine-tuned weight of the same shape.
        alpha: share of the delta that is kept, in [0, 1]; both ends are exact.

    Returns:
        aligned + alpha · delta. `kept_fraction` is alpha, `safety_cost` NaN: no curvature is known.

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
        kept_fraction=alpha,
        safety_cost=math.nan,
        utility_loss=(1 - alpha) ** 2,
        detail={"delta_norm": math.sqrt(norm)},
    )
