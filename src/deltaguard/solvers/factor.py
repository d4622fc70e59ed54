"""One factorisation of a layer's curvature that serves every fine-tune of the aligned model.

Safe Delta visits columns in the order of h_j = [H⁻¹]_jj, which depends on the curvature alone. With the
columns ordered from the most costly (smallest h) to the least, the unselected columns U of *any* budget are
the first ones, so the leading block of one Cholesky factor H[order, order] = L Lᵀ factorises H_UU for all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.solvers.solution import damped_by

MAX_DAMPENING = 1.0
"""Relative dampening beyond which H no longer says anything that its diagonal does not."""


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a damped curvature matrix, its columns ordered from most to least costly.

    Attributes:
        order: (in,) int64; `order[0]` is the column whose change costs most.
        lower: (in, in); L of H_damped[order][:, order] = L Lᵀ.
        inverse_diagonal: (in,); h_j = [H_damped⁻¹]_jj in the original order of columns.
        damping: λ, what was added to the diagonal.
        dampening: λ / mean diag H; larger than asked where H could not be factorised otherwise.
    """

    order: Tensor
    lower: Tensor
    inverse_diagonal: Tensor
    damping: float
    dampening: float


def factorise(hessian: Tensor, *, dampening: float = 0.01) -> Factor:
    """Damp a curvature matrix, order its columns by cost and factorise it.

    λ = dampening · mean diag H is added to the diagonal. Where the Cholesky factorisation fails, the
    dampening rises tenfold at a time up to 1 and the value used is recorded.

    Args:
        hessian: H, (in, in), symmetric positive semi-definite; only its scale relative to itself matters.
        dampening: λ as a share of the mean diagonal, in (0, 1].

    Returns:
        The factor, in the dtype and on the device of `hessian`.

    Raises:
        ValueError: the dampening is not in (0, 1], H is zero, or it cannot be factorised at dampening 1.

    Example:
        >>> import torch
        >>> factor = factorise(torch.diag(torch.tensor([1.0, 100.0])))
        >>> factor.order.tolist()  # the second column's inputs are larger: changing it costs more
        [1, 0]
    """
    if not 0 < dampening <= MAX_DAMPENING:
        raise ValueError(f"dampening is {dampening}; it must lie in (0, {MAX_DAMPENING:g}].")
    mean = float(hessian.diagonal().mean())
    if not mean > 0:
        raise ValueError("The curvature is zero: no safety token reached this layer.")
    used = dampening
    while True:
        lower, info = torch.linalg.cholesky_ex(damped_by(hessian, used * mean))
        if int(info) == 0:
            inverse_diagonal = torch.cholesky_inverse(lower).diagonal().clone()
            order = torch.argsort(inverse_diagonal, descending=True, stable=True).flip(0)
            # In another order rounding is another, too.
            lower, info = torch.linalg.cholesky_ex(damped_by(hessian, used * mean)[order][:, order])
            if int(info) == 0:
                break
        if used >= MAX_DAMPENING:
            raise ValueError(
                f"The curvature cannot be factorised, even with dampening {used:g} (asked: {dampening:g}): "
                "it is not positive semi-definite."
            )
        used = min(used * 10, MAX_DAMPENING)
    return Factor(
        order=order,
        lower=lower,
        inverse_diagonal=inverse_diagonal,
        damping=used * mean,
        dampening=used,
    )
