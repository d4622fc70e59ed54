"""Safe Delta's selection and compensation (Lu et al., ICML 2025, section 4), column by column.

An entry's ratio of utility to safety cost is 2·h_j: it depends on the column alone. Selecting entries is
therefore a sort of `in` numbers and a cumulative sum; only one boundary column is taken in part.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltaguard.solvers.factor import Factor, factorise
from deltaguard.solvers.solution import (
    Solution,
    check_hessian,
    check_matrices,
    share,
    squared_norm,
    working_dtype,
)

Budget = Literal["paper", "fraction"]
Compensation = Literal["joint", "additive", "none"]

ROUNDING = 1e-12
"""Relative slack of the budget, so that a sum in another order does not lose the last entry."""

BLOCK = 512
"""Width of the column blocks in which the zero half of a triangular factor is skipped."""


@dataclass(frozen=True)
class _Selection:
    """The entries that take the fine-tuned value, in the factor's order of columns.

    Columns from `kept_from` on are selected whole; of the column before it, the rows in `boundary_rows`.
    """

    kept_from: int
    boundary_rows: Tensor

    def entries(self, rows: int, columns: int) -> int:
        """How many entries are selected."""
        return rows * (columns - self.kept_from) + int(self.boundary_rows.numel())

    def mask(self, delta: Tensor) -> Tensor:
        """The selection as a boolean matrix like `delta`."""
        mask = torch.zeros_like(delta, dtype=torch.bool)
        mask[:, self.kept_from :] = True
        if self.kept_from > 0:
            mask[self.boundary_rows, self.kept_from - 1] = True
        return mask


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
    """`greedy` with the curvature already factorised, as a CurvatureStore holds it.

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
    dtype = working_dtype(aligned, finetuned, factor.lower)
    base, target = aligned.to(dtype), finetuned.to(dtype)
    delta = (target - base)[:, factor.order]
    selection = _select(delta, factor.inverse_diagonal[factor.order], strength, budget)
    restored, damped_before, damped_after = _compensate(delta, factor, selection, compensation)
    weight = torch.empty_like(base)
    weight[:, factor.order] = torch.where(
        selection.mask(delta), target[:, factor.order], base[:, factor.order] + restored
    )
    norm, lost = squared_norm(delta), squared_norm(restored - delta)
    before = damped_before - factor.damping * norm
    after = max(damped_after - factor.damping * squared_norm(restored), 0.0)
    return Solution(
        weight=weight,
        kept_fraction=selection.entries(*delta.shape) / delta.numel(),
        safety_cost=share(after, before),
        utility_loss=share(lost, norm),
        detail={"dampening": factor.dampening, "damped_safety_cost": share(damped_after, damped_before)},
    )


def _check_options(strength: float, budget: str, compensation: str) -> None:
    if budget not in ("paper", "fraction"):
        raise ValueError(f"budget is {budget!r}; it must be 'paper' or 'fraction'.")
    if compensation not in ("joint", "additive", "none"):
        raise ValueError(f"compensation is {compensation!r}; it must be 'joint', 'additive' or 'none'.")
    if not strength >= 0 or (budget == "fraction" and strength > 1):
        limit = "[0, 1] with the budget 'fraction'" if budget == "fraction" else "[0, infinity)"
        raise ValueError(f"strength is {strength}; it must lie in {limit}.")


def _select(delta: Tensor, h: Tensor, strength: float, budget: Budget) -> _Selection:
    """The longest prefix, cheapest columns first, whose summed cost stays within the budget."""
    columns = delta.shape[1]
    price = 1 / (2 * h.double())
    costs = torch.linalg.vector_norm(delta, dim=0, dtype=torch.float64).square() * price
    total = float(costs.sum())
    everything = _Selection(0, torch.empty(0, dtype=torch.long, device=delta.device))
    if budget == "fraction" and strength == 1:
        return everything
    limit = strength * (total if budget == "fraction" else float(price.mean())) * (1 + ROUNDING)
    spent = costs.flip(0).cumsum(0)
    whole = int((spent <= limit).sum())
    if whole == columns:
        return everything
    left = limit - (float(spent[whole - 1]) if whole else 0.0)
    edge = columns - whole
    ordered, by_cost = torch.sort(delta[:, edge - 1].double().square() * price[edge - 1], stable=True)
    return _Selection(edge, by_cost[: int((ordered.cumsum(0) <= left).sum())])


def _compensate(
    delta: Tensor, factor: Factor, selection: _Selection, compensation: Compensation
) -> tuple[Tensor, float, float]:
    """The restored delta, and tr(Δ H_damped Δᵀ) before and after, all in the factor's order."""
    if compensation == "joint":
        return _compensate_jointly(delta, factor.lower, selection)
    mask = selection.mask(delta)
    restored = delta * mask
    if compensation == "additive":
        weighted = restored / factor.inverse_diagonal[factor.order]
        restored = torch.where(mask, restored, weighted @ torch.cholesky_inverse(factor.lower))
    before = squared_norm(_times_lower(delta, factor.lower))
    return restored, before, squared_norm(_times_lower(restored, factor.lower))


def _compensate_jointly(delta: Tensor, lower: Tensor, selection: _Selection) -> tuple[Tensor, float, float]:
    """-Δ_S L_SU L_UU⁻¹ on the unselected columns U, which are the first ones of the factor.

    A row whose boundary entry is selected has one column fewer in U: its right-hand side takes the
    entry's part, and a zero there keeps the triangular solve from touching it.
    """
    edge, rows = selection.kept_from, selection.boundary_rows
    within = _times_lower(delta[:, edge:], lower[edge:, edge:])
    across = delta[:, edge:] @ lower[edge:, :edge]
    own = _times_lower(delta[:, :edge], lower[:edge, :edge])
    before = squared_norm(within) + squared_norm(own.add_(across))
    after = squared_norm(within)
    if rows.numel():
        after += squared_norm(own[rows, edge - 1])
        across[rows] += delta[rows, edge - 1 : edge] * lower[edge - 1, :edge]
        across[rows, edge - 1] = 0
    restored = delta.clone()
    restored[:, :edge] = torch.linalg.solve_triangular(
        lower[:edge, :edge], across.neg_(), upper=False, left=False
    )
    restored[rows, edge - 1] = delta[rows, edge - 1]
    return restored, before, after


def _times_lower(matrix: Tensor, lower: Tensor) -> Tensor:
    """`matrix @ lower`, skipping the blocks of the triangular factor that are zero."""
    product = torch.empty_like(matrix)
    for start in range(0, lower.shape[0], BLOCK):
        stop = start + BLOCK
        torch.matmul(matrix[:, start:], lower[start:, start:stop], out=product[:, start:stop])
    return product
