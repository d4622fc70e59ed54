"""The best approximation of a delta by a product of two thin matrices, which is what a LoRA adapter holds.

By Eckart and Young it is the singular value decomposition cut off after r values. The singular values are
split evenly between the two factors, so that neither leaves the range of half precision.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.solvers.solution import is_finite, leading_singular, squared_norm, working_dtype

ROUNDING = 1e-6
"""Share of a delta's squared norm that a cut may lose unsaid: less than half precision rounds away."""

_EXACT_SIDE = 1024
"""Shorter side up to which a full decomposition is cheap enough."""
_OVERSAMPLING = 10
"""Directions sketched beyond those kept: the last ones of a sketch are inexact."""
_FIRST_SKETCH = 64
_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class LowRank:
    """A delta as the product of two factors: up @ down.

    Attributes:
        down: (r, in), PEFT's A.
        up: (out, r), PEFT's B.
        residual: ‖up @ down - Δ‖² / ‖Δ‖² (Frobenius), 0 or more; 0 where Δ is zero.
    """

    down: Tensor
    up: Tensor
    residual: float


def low_rank(delta: Tensor, *, rank: int | None, tolerance: float = 0.01) -> LowRank:
    """Approximate a delta by a matrix of low rank, as well as it can be.

    Where the shorter side is above 1024, the leading singular vectors are found by random sketches with
    power iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061), with a seed of their own: the same
    delta gives the same factors. The residual is that of the factors returned, whichever way they were found.

    Args:
        delta: Δ, (out, in).
        rank: r, 1 or more; one above the shorter side is taken as that side, which loses nothing. None takes
            the smallest rank whose residual is within the tolerance: 0 for a delta of zero. Found from a
            sketch, it may be larger than the smallest by a few.
        tolerance: the residual allowed where `rank` is None, in [0, 1).

    Returns:
        The factors, in float32 or the delta's higher precision.

    Raises:
        ValueError: Δ is not a matrix or not finite, or an option is out of range.

    Example:
        >>> import torch
        >>> found = low_rank(torch.diag(torch.tensor([3.0, 1.0])), rank=1)
        >>> (found.up @ found.down).tolist(), round(found.residual, 6)
        ([[3.0, 0.0], [0.0, 0.0]], 0.1)
    """
    _check(delta, rank=rank, tolerance=tolerance)
    return _cut(_decompose(delta.to(working_dtype(delta)), rank, tolerance), rank, tolerance)


def low_rank_of_factors(up: Tensor, down: Tensor, *, rank: int | None, tolerance: float = 0.01) -> LowRank:
    """Approximate a delta that is given as up @ down, as `low_rank` does: exactly, and it is never formed.

    Args:
        up: (out, k).
        down: (k, in).
        rank: as in `low_rank`; no more than k directions can be found.
        tolerance: as in `low_rank`.

    Returns:
        The factors, in float32 or the higher precision of the factors given.

    Raises:
        ValueError: the factors do not fit together or are not finite, or an option is out of range.

    Example:
        >>> import torch
        >>> twice = torch.ones(3, 2)
        >>> low_rank_of_factors(twice, twice.T, rank=None).down.shape
        torch.Size([1, 3])
    """
    _check(up, down, rank=rank, tolerance=tolerance)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"The factors are {tuple(up.shape)} and {tuple(down.shape)}: their ranks differ.")
    dtype = working_dtype(up, down)
    left, upper = torch.linalg.qr(up.to(dtype))
    right, lower = torch.linalg.qr(down.T.to(dtype))
    core = _exact(upper @ lower.T)
    return _cut(_Svd(left @ core.left, core.values, core.right @ right.T, 0.0), rank, tolerance)


@dataclass(frozen=True)
class _Svd:
    """Leading singular values and vectors."""

    left: Tensor  # (out, q)
    values: Tensor  # (q,), falling
    right: Tensor  # (q, in)
    rest: float  # what the other singular values add to the squared norm

    def residuals(self) -> Tensor:
        """Compute the share of the squared norm that is lost at ranks 0 to q; (q + 1,), float64."""
        squares = self.values.cpu().double().square()
        lost = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + self.rest
        return lost / lost[0] if lost[0] > 0 else lost


def _decompose(delta: Tensor, rank: int | None, tolerance: float) -> _Svd:
    shorter = min(delta.shape)
    if shorter <= _EXACT_SIDE:
        return _exact(delta)
    size = _FIRST_SKETCH if rank is None else rank + _OVERSAMPLING
    # A sketch of more directions costs as much as all of them.
    while size <= shorter // 2:
        left, values, right = leading_singular(delta, size, iterations=_POWER_ITERATIONS)
        # The sketch is a projection of the delta, so what it lacks is orthogonal to it.
        rest = squared_norm(delta) - squared_norm(values.double())
        found = _Svd(left, values, right.T, max(rest, 0.0))
        if rank is not None or found.residuals()[size - _OVERSAMPLING] <= tolerance:
            return found
        size *= 2
    return _exact(delta)


def _exact(delta: Tensor) -> _Svd:
    if not is_finite(delta):
        raise ValueError(f"The product of the delta's factors is too large for {delta.dtype}.")
    return _Svd(*torch.linalg.svd(delta, full_matrices=False), rest=0.0)


def _cut(found: _Svd, rank: int | None, tolerance: float) -> LowRank:
    residuals = found.residuals()
    kept = int((residuals > tolerance).sum()) if rank is None else min(rank, len(found.values))
    roots = found.values[:kept].sqrt()
    return LowRank(
        down=roots[:, None] * found.right[:kept],
        up=found.left[:, :kept] * roots,
        residual=float(residuals[kept]),
    )


def _check(*matrices: Tensor, rank: int | None, tolerance: float) -> None:
    for matrix in matrices:
        if matrix.ndim != 2:
            raise ValueError(f"The shape {tuple(matrix.shape)} was given; a matrix is needed.")
        if not is_finite(matrix):
            raise ValueError("The delta holds NaN or infinite entries.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must lie in [0, 1).")
