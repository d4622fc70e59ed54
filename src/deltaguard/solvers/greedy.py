"""Safe Delta's selection and compensation (Lu et al., ICML 2025, section 4), column by column.

An entry's ratio of utility to safety cost is 2·h_j: it depends on the column alone. Selecting entries is
therefore a sort of `in` numbers and a cumulative sum; only one boundary column is taken in part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltaguard.solvers.factor import Factor, factorise
from deltaguard.solvers.solution import (
    Solution,
    check_hessian,
    check_matrices,
    row_blocks,
    share,
    squared_norm,
    working_dtype,
)

Budget = Literal["paper", "fraction"]
Compensation = Literal["joint", "additive", "none"]

BLOCK = 512
"""Width of the column blocks in which the zero half of a triangular factor is skipped."""

ROUNDING = 1e-12
"""Relative slack of the budget, so that a sum in another order does not lose the last entry."""


@dataclass(frozen=True)
class _Layer:
    """A layer's matrices, and the precision in which they are worked on."""

    aligned: Tensor
    finetuned: Tensor
    factor: Factor
    dtype: torch.dtype

    def delta(self, rows: slice = slice(None), columns: slice | Tensor = slice(None)) -> Tensor:
        return self.finetuned[rows, columns].to(self.dtype) - self.aligned[rows, columns].to(self.dtype)


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


@dataclass
class _Sums:
    """Squared norms, summed over rows."""

    norm: float = 0.0  # ‖Δ‖²
    kept: float = 0.0  # ⟨Δ', Δ⟩
    lost: float = 0.0  # ‖Δ' - Δ‖²
    remaining: float = 0.0  # ‖Δ'‖²
    damped_before: float = 0.0  # tr(Δ H_damped Δᵀ)
    damped_after: float = 0.0  # tr(Δ' H_damped Δ'ᵀ)


def greedy(
    aligned: Tensor,
    finetuned: Tensor,
    hessian: Tensor,
    *,
    strength: float,
    budget: Budget = "fraction",
    compensation: Compensation = "joint",
    dampening: float = 0.01,
) -> Solution:
    """Keep the changes that buy most utility within a safety budget and compensate on the rest.

    With H damped and h_j = [H⁻¹]_jj, entry (r, j) costs Δ_rj² / (2 h_j) in safety and buys Δ_rj².
    Entries are taken by descending ratio until the summed cost would pass the budget;
    entries of one column tie and are taken smallest first, so the order of rows does not matter.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight, (out, in).
        hessian: H = mean of x xᵀ over safety tokens, (in, in).
        strength: how much is kept; larger keeps more. 0 gives the aligned weight.
        budget: "fraction": the selection costs at most `strength` times what all entries cost, strength
            in [0, 1], 1 gives the fine-tuned weight; "paper": at most strength · mean_j 1/(2 h_j).
        compensation: "joint": the exact optimum given the selection S, Δ_U = -Δ_S H_SU H_UU⁻¹;
            "additive": the paper's formula, the optimum for each selected entry alone, summed;
            "none": unselected entries keep the aligned value.
        dampening: share of the mean diagonal of H that is added to its diagonal.

    Returns:
        The restored weight. `detail` holds the dampening used and the cost under the damped H.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, an option is out of range, or H cannot be
            factorised.

    Example:
        >>> import torch
        >>> aligned, hessian = torch.zeros(1, 2), torch.diag(torch.tensor([1.0, 100.0]))
        >>> greedy(aligned, torch.ones(1, 2), hessian, strength=0.5).weight.tolist()
        [[1.0, 0.0]]
    """
    check_matrices(aligned, finetuned)
    check_hessian(hessian, aligned.shape[1])
    dtype = working_dtype(aligned, finetuned, hessian)
    factor = factorise(hessian.to(dtype), dampening=dampening)
    return greedy_factored(
        aligned, finetuned, factor, strength=strength, budget=budget, compensation=compensation
    )


def greedy_factored(
    aligned: Tensor,
    finetuned: Tensor,
    factor: Factor,
    *,
    strength: float,
    budget: Budget = "fraction",
    compensation: Compensation = "joint",
) -> Solution:
    """Solve `greedy` with the curvature already factorised, as a CurvatureStore holds it.

    Costs at most 2·out·in² floating-point operations with joint compensation: with B = ΔL, the exact
    optimum on the unselected columns U (the first ones of the factor's order) cancels B_U, and what it
    still costs is the squared norm of the rest of B.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight, (out, in).
        factor: the layer's damped curvature, see `factorise`.
        strength: as in `greedy`.
        budget: as in `greedy`.
        compensation: as in `greedy`.

    Returns:
        As `greedy`.

    Raises:
        ValueError: as `greedy`.
    """
    check_matrices(aligned, finetuned)
    _check_options(strength, budget, compensation)
    layer = _Layer(aligned, finetuned, factor, working_dtype(aligned, finetuned, factor.lower))
    selection = _select(layer, strength, budget)
    compensate = compensator(factor, compensation)
    weight = torch.empty(aligned.shape, dtype=layer.dtype, device=aligned.device)
    sums = _Sums()
    for rows in row_blocks(aligned):
        _restore_rows(layer, rows, selection.within(rows), compensate, weight[rows], sums)
    before = sums.damped_before - factor.damping * sums.norm
    after = max(sums.damped_after - factor.damping * sums.remaining, 0.0)
    return Solution(
        weight=weight,
        kept_energy=share(sums.kept, sums.norm),
        kept_entries=selection.entries(*aligned.shape) / aligned.numel(),
        safety_cost=share(after, before),
        utility_loss=share(sums.lost, sums.norm),
        detail={
            "dampening": factor.dampening,
            "damped_safety_cost": share(sums.damped_after, sums.damped_before),
            "delta_norm": math.sqrt(sums.norm),
        },
    )


def _check_options(strength: float, budget: str, compensation: str) -> None:
    if budget not in ("paper", "fraction"):
        raise ValueError(f"budget is {budget!r}; it must be 'paper' or 'fraction'.")
    if compensation not in ("joint", "additive", "none"):
        raise ValueError(f"compensation is {compensation!r}; it must be 'joint', 'additive' or 'none'.")
    if not strength >= 0 or (budget == "fraction" and strength > 1):
        limit = "[0, 1] with the budget 'fraction'" if budget == "fraction" else "[0, infinity)"
        raise ValueError(f"strength is {strength}; it must lie in {limit}.")


def _select(layer: _Layer, strength: float, budget: Budget) -> Selection:
    """Find the longest prefix, cheapest columns first, whose summed cost stays within the budget."""
    order = layer.factor.order
    price = 1 / (2 * layer.factor.inverse_diagonal[order].double())
    squares = (layer.delta(rows).square_() for rows in row_blocks(layer.aligned))
    norms = torch.stack([block.sum(dim=0, dtype=torch.float64) for block in squares]).sum(dim=0)
    costs = norms[order] * price
    total = float(costs.sum())
    everything = Selection(0, torch.empty(0, dtype=torch.long, device=order.device))
    if budget == "fraction" and strength == 1:
        return everything
    limit = strength * (total if budget == "fraction" else float(price.mean())) * (1 + ROUNDING)
    spent = costs.flip(0).cumsum(0)
    whole = int((spent <= limit).sum())
    if whole == len(order):
        return everything
    left = limit - (float(spent[whole - 1]) if whole else 0.0)
    edge = len(order) - whole
    column = layer.delta(columns=order[edge - 1]).double()
    ordered, by_cost = torch.sort(column.square() * price[edge - 1], stable=True)
    return Selection(edge, by_cost[: int((ordered.cumsum(0) <= left).sum())])


def _restore_rows(
    layer: _Layer, rows: slice, selection: Selection, compensate: Compensate, weight: Tensor, sums: _Sums
) -> None:
    """Fill the rows of the restored weight, and add them to the sums."""
    order, edge = layer.factor.order, selection.kept_from
    base, target = layer.aligned[rows].to(layer.dtype), layer.finetuned[rows].to(layer.dtype)
    delta = (target - base).index_select(1, order)
    unselected, before, after = compensate(delta, selection)
    weight.copy_(target)
    weight[:, order[:edge]] = base.index_select(1, order[:edge]).add_(unselected)
    if len(selection.boundary_rows):
        column = order[edge - 1]
        weight[selection.boundary_rows, column] = target[selection.boundary_rows, column]
    selected, rest = squared_norm(delta[:, edge:]), delta[:, :edge]
    sums.norm += selected + squared_norm(rest)
    sums.kept += selected + float((unselected * rest).sum(dim=1, dtype=torch.float64).sum())
    sums.lost += squared_norm(unselected - rest)
    sums.remaining += selected + squared_norm(unselected)
    sums.damped_before += before
    sums.damped_after += after


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
