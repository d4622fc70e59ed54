"""What every solver returns, and the numbers that describe it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROW_BLOCK_ENTRIES = 1 << 22
"""Entries of a block of rows: few enough for memory that the process keeps between blocks."""

CACHED_ENTRIES = 1 << 18
"""So few stay in a core's cache from one operation to the next."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was kept of one linear layer's delta, and at what cost.

    Attributes:
        kept_energy: ⟨Δ', Δ⟩ / ‖Δ‖², the share of the delta's energy that is left; 0 is the aligned weight, 1
            the fine-tuned one.
        kept_entries: share of the entries that carry the fine-tuned value; None where the method selects no
            entries, because it shrinks them all.
        safety_cost: tr(Δ' H Δ'ᵀ) / tr(Δ H Δᵀ), where Δ' is the restored delta; 0 is the aligned
            weight, 1 the fine-tuned one. NaN where no curvature is known.
        utility_loss: ‖Δ' - Δ‖² / ‖Δ‖²; 0 is the fine-tuned weight, 1 the aligned one.
        detail: `delta_norm`, ‖Δ‖, and numbers that belong to one method, such as the dampening needed.
    """

    kept_energy: float
    kept_entries: float | None = None
    safety_cost: float
    utility_loss: float
    detail: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class Solution(Outcome):
    """The restored weight of one linear layer.

    Attributes:
        weight: restored weight, (out, in), in the working precision.
    """

    weight: Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Choose float64 where any input is float64, else float32: half precision is too coarse to solve in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@dataclass(frozen=True)
class Difference:
    """A delta, finetuned - aligned, of which rows are computed when they are needed.

    Whole, it would take twice the memory of both weights in half precision, and fresh memory costs more than
    the subtraction.

    Attributes:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight, likewise.
        dtype: the precision of the delta.
    """

    aligned: Tensor
    finetuned: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Refuse weights of different shapes."""
        check_shapes(self.aligned, self.finetuned)

    def into(self, target: Tensor, rows: slice) -> None:
        """Compute rows of the delta.

        Args:
            target: takes them, (rows, in), in `dtype`.
            rows: which.
        """
        aligned, finetuned = self.aligned[rows], self.finetuned[rows]
        for part in cached_blocks(target):
            target[part].copy_(finetuned[part]).sub_(aligned[part].to(self.dtype))


def check_shapes(aligned: Tensor, finetuned: Tensor) -> None:
    """Refuse weights that are not two matrices of one shape.

    Raises:
        ValueError: they are not.
    """
    if aligned.ndim != 2 or aligned.shape != finetuned.shape:
        raise ValueError(
            f"The aligned weight is {tuple(aligned.shape)} and the fine-tuned one {tuple(finetuned.shape)}: "
            "two matrices of the same shape are needed."
        )


def check_matrices(aligned: Tensor, finetuned: Tensor) -> None:
    """Refuse weights of different shapes, or a delta that is not finite.

    Raises:
        ValueError: the shapes differ, a weight is not a matrix, or an entry is NaN or infinite.
    """
    check_shapes(aligned, finetuned)
    for name, weight in (("aligned", aligned), ("fine-tuned", finetuned)):
        if not is_finite(weight):
            bad = int(weight.numel() - weight.isfinite().sum())
            raise ValueError(f"The {name} weight holds {bad} entries that are NaN or infinite.")


def check_hessian(hessian: Tensor, columns: int) -> None:
    """Refuse a curvature matrix that does not fit the weight's columns or is not finite.

    Raises:
        ValueError: the shape is not (columns, columns), or an entry is NaN or infinite.
    """
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(f"The curvature is {tuple(hessian.shape)}; ({columns}, {columns}) is needed.")
    if not is_finite(hessian):
        raise ValueError("The curvature holds NaN or infinite entries.")


def is_finite(matrix: Tensor) -> bool:
    """Say whether no entry is NaN or infinite; one pass that allocates nothing."""
    return not matrix.numel() or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(matrix))


def row_blocks(matrix: Tensor, *, least: int = 1) -> Iterator[slice]:
    """Cut a matrix into blocks of rows.

    Work that treats rows alike is done block by block: fresh memory for temporaries of a whole matrix costs
    more than the arithmetic on it. A GPU keeps its memory and likes large matrices: there one block is all.

    Args:
        matrix: (rows, columns).
        least: rows of a block, whatever size that makes.
    """
    return _blocks(matrix, ROW_BLOCK_ENTRIES, least)


def cached_blocks(matrix: Tensor) -> Iterator[slice]:
    """Cut a matrix as `row_blocks`, so small that several operations on a block find it in the cache."""
    return _blocks(matrix, CACHED_ENTRIES, 1)


def _blocks(matrix: Tensor, entries: int, least: int) -> Iterator[slice]:
    count = max(1, matrix.shape[0])
    rows = count if matrix.is_cuda else max(least, entries // max(1, matrix.shape[1]))
    return (slice(start, start + rows) for start in range(0, matrix.shape[0], rows))


def damped_by(matrix: Tensor, damping: float, dtype: torch.dtype | None = None) -> Tensor:
    """Add a multiple of the identity, in memory of its own."""
    damped = matrix.to(dtype or matrix.dtype, copy=True)
    damped.diagonal().add_(damping)
    return damped


def leading_singular(matrix: Tensor, count: int, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the leading singular vectors and values by a random sketch with power iterations.

    After Halko, Martinsson and Tropp 2011, arXiv:0909.4061. The seed is its own: the same matrix gives the
    same result, and the generators of others are left as they were.

    Returns:
        Left vectors, (m, count); values, (count,), falling; right vectors, (n, count).
    """
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        # torch.manual_seed would seed every GPU, and the fork puts back this one alone.
        own = (
            torch.cuda.default_generators[matrix.get_device()] if matrix.is_cuda else torch.default_generator
        )
        own.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=count, niter=iterations)
    return left, values, right


def share(part: float, whole: float) -> float:
    """Divide a part by its whole, and give 0 where there is nothing to share."""
    return part / whole if whole > 0 else 0.0


def squared_norm(matrix: Tensor) -> float:
    """Square the Frobenius norm; rows are added in float64, since a long float32 sum loses digits."""
    return float(sum_of_squares(matrix))


def sum_of_squares(matrix: Tensor) -> Tensor:
    """Square the Frobenius norm as `squared_norm` does, on the device: reading a number waits for it."""
    return torch.linalg.vector_norm(matrix, dim=-1).double().square().sum()
