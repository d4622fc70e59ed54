"""Safe Delta in float64, entry by entry, from the paper's equations: slow, and easy to check by eye."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def damp(hessian: Matrix, dampening: float) -> Matrix:
    return hessian + dampening * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def select(
    delta: Matrix, hessian: Matrix, strength: float, budget: str, dampening: float
) -> NDArray[np.bool_]:
    """Entries in descending order of utility over cost, until the summed cost passes the budget."""
    h = np.diag(np.linalg.inv(damp(hessian, dampening)))
    entries = []
    for row in range(delta.shape[0]):
        for column in range(delta.shape[1]):
            cost = delta[row, column] ** 2 / (2 * h[column])
            ratio = 2 * h[column]  # utility Δ² over cost
            entries.append((-ratio, column, cost, row))
    total = sum(cost for _, _, cost, _ in entries)
    limit = strength * (total if budget == "fraction" else np.mean(1 / (2 * h)))
    mask = np.zeros(delta.shape, dtype=bool)
    spent = 0.0
    for _, column, cost, row in sorted(entries):
        spent += cost
        if spent > limit * (1 + 1e-12) and not (budget == "fraction" and strength == 1):
            break
        mask[row, column] = True
    return mask


def compensate(
    delta: Matrix, mask: NDArray[np.bool_], hessian: Matrix, kind: str, dampening: float
) -> Matrix:
    """The restored delta: selected entries as they are, the others compensating for them."""
    damped = damp(hessian, dampening)
    inverse = np.linalg.inv(damped)
    restored = np.where(mask, delta, 0.0)
    for row in range(delta.shape[0]):
        chosen, rest = np.flatnonzero(mask[row]), np.flatnonzero(~mask[row])
        if kind == "none" or len(chosen) == 0 or len(rest) == 0:
            continue
        if kind == "joint":
            kept = delta[row, chosen]
            restored[row, rest] = -np.linalg.solve(
                damped[np.ix_(rest, rest)], damped[np.ix_(rest, chosen)] @ kept
            )
            continue
        for column in rest:
            for m in chosen:
                restored[row, column] += delta[row, m] * inverse[column, m] / inverse[m, m]
    return restored


def safety_cost(delta: Matrix, hessian: Matrix) -> float:
    """tr(Δ H Δᵀ), summed entry by entry over rows."""
    return float(sum(row @ hessian @ row for row in delta))
