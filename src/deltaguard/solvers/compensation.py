"""The entries that `greedy` selects, and what becomes of the others, in the factor's order of columns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltaguard.solvers.factor import Factor
from deltaguard.solvers.solution import squared_norm

Compensation = Literal["joint", "additive", "none"]

BLOCK = 512
"""Width of the column blocks in which the zero half of a triangular factor is skipped."""


@dataclass(frozen=True)
class Selection:
    """The entries that take the fine-tuned value, in the factor's order of columns.

    Columns from `kept_from` on are selected whole; of the column before it, the rows in `boundary_rows`.
    """

    kept_from: int
    boundary_rows: Tensor

    def within(self, rows: slice) -> "Selection":
        """Select within a block of rows, which are counted from its first one."""
        inside = (self.boundary_rows >= rows.start) & (self.boundary_rows < rows.stop)
        return Selection(self.kept_from, self.boundary_rows[inside] - rows.start)

    def entries(self, rows: int, columns: int) -> int:
        """Count the entries that are selected."""
        return rows * (columns - self.kept_from) + int(self.boundary_rows.numel())

    def mask(self, delta: Tensor) -> Tensor:
        """Write the selection as a boolean matrix like `delta`."""
        mask = torch.zeros_like(delta, dtype=torch.bool)
        mask[:, self.kept_from :] = True
        if self.kept_from > 0:
            mask[self.boundary_rows, self.kept_from - 1] = True
        return mask


Compensate = Callable[[Tensor, Selection], tuple[Tensor, float, float]]


def compensator(factor: Factor, compensation: Compensation) -> Compensate:
    """Choose what finds some rows' restored delta in the columns before `kept_from`.

    With the delta it returns the rows' tr(Δ H_damped Δᵀ) before and after.
    """
    if compensation == "joint":
        return lambda delta, selection: _jointly(delta, factor.lower, selection)
    shift = None
    if compensation == "additive":
        shift = torch.cholesky_inverse(factor.lower) / factor.inverse_diagonal[factor.order, None]
    return lambda delta, selection: _separately(delta, factor.lower, selection, shift)


def _separately(
    delta: Tensor, lower: Tensor, selection: Selection, shift: Tensor | None
) -> tuple[Tensor, float, float]:
    """Let each selected entry move the unselected ones on its own, by its row of `shift`."""
    mask = selection.mask(delta)
    restored = delta * mask
    if shift is not None:
        restored = torch.where(mask, restored, restored @ shift)
    before = squared_norm(_times_lower(delta, lower))
    after = squared_norm(_times_lower(restored, lower))
    return restored[:, : selection.kept_from], before, after


def _jointly(delta: Tensor, lower: Tensor, selection: Selection) -> tuple[Tensor, float, float]:
    """Compute -Δ_S L_SU L_UU⁻¹ on the unselected columns U, which are the first ones of the factor.

    A row whose boundary entry is selected has one column fewer in U: its right-hand side takes the
    entry's part, and a zero there keeps the triangular solve from touching it.
    """
    edge, rows = selection.kept_from, selection.boundary_rows
    within = _times_lower(delta[:, edge:], lower[edge:, edge:])
    across = delta[:, edge:] @ lower[edge:, :edge]
    own = _times_lower(delta[:, :edge], lower[:edge, :edge])
    after = squared_norm(within)
    before = after + squared_norm(own.add_(across))
    if len(rows):
        after += squared_norm(own[rows, edge - 1])
        across[rows] += delta[rows, edge - 1 : edge] * lower[edge - 1, :edge]
        across[rows, edge - 1] = 0
    unselected = _divide_by_lower(across.neg_(), lower[:edge, :edge])
    if len(rows):
        unselected[rows, edge - 1] = delta[rows, edge - 1]
    return unselected, before, after


def _times_lower(matrix: Tensor, lower: Tensor) -> Tensor:
    """Compute `matrix @ lower`, skipping the blocks of the triangular factor that are zero."""
    product = torch.empty_like(matrix)
    for start in range(0, lower.shape[0], BLOCK):
        stop = start + BLOCK
        torch.matmul(matrix[:, start:], lower[start:, start:stop], out=product[:, start:stop])
    return product


def _divide_by_lower(matrix: Tensor, lower: Tensor) -> Tensor:
    """Solve X @ lower = matrix in the place of `matrix`: mostly products, which are faster than solving."""
    for start in reversed(range(0, lower.shape[0], BLOCK)):
        stop = start + BLOCK
        block = matrix[:, start:stop]
        block.addmm_(matrix[:, stop:], lower[stop:, start:stop], alpha=-1)
        # Transposed, both matrices lie in memory as the solver wants them.
        diagonal = lower[start:stop, start:stop].T
        block.copy_(torch.linalg.solve_triangular(diagonal, block.T, upper=True).T)
    return matrix
