"""1 / (1 + μ g h) as a short sum of products of a function of g and a function of h.

The function depends on log g + log h alone and changes over a few decades, so that as a matrix over any
values of g and h it is numerically of low rank. Cross approximation (Bebendorf 2000, doi:10.1007/PL00005410)
finds the terms: it takes the entry where the error is largest and subtracts its row and column, until none is
left.
"""

import math

import torch
from torch import Tensor

_TOLERANCE = 1e-6
"""Largest error of a factor 1 / (1 + μ g h), which lies in [0, 1]: below the rounding of half precision."""
_FREE = 1e-3 * _TOLERANCE
"""A price below this is as good as none."""
_PER_DECADE = 16
"""Values of g and of h at which the largest error is looked for."""


def separable(g: Tensor, h: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """P and Q with P Qᵀ ≈ 1 / (1 + μ g hᵀ), no entry off by more than about 1e-6.

    Args:
        g: (m,), 0 or more.
        h: (n,), 0 or more.
        mu: above 0 and finite.

    Returns:
        (m, k) and (n, k), float64. k grows with the logarithm of the range of prices: about 25 where they
        span eight decades.

    Example:
        >>> import torch
        >>> left, right = separable(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), 1.0)
        >>> (left @ right.T).round(decimals=4).tolist()
        [[1.0, 1.0], [0.5, 0.25]]
    """
    g, h = g.double() * mu, h.double()
    g_grid, h_grid = _grid(g, float(h.max())), _grid(h, float(g.max()))
    g, h = torch.cat([g_grid, g]), torch.cat([h_grid, h])
    left, right = g.new_empty(len(g), 0), h.new_empty(len(h), 0)
    error = _kernel(g_grid[:, None], h_grid[None, :])
    while float(error.abs().max()) > _TOLERANCE:
        row, column = divmod(int(error.abs().argmax()), len(h_grid))
        of_g = (_kernel(g, h_grid[column]) - left @ right[column]) / error[row, column]
        of_h = _kernel(g_grid[row], h) - right @ left[row]
        left, right = torch.column_stack([left, of_g]), torch.column_stack([right, of_h])
        error = error - torch.outer(of_g[: len(g_grid)], of_h[: len(h_grid)])
    return left[len(g_grid) :], right[len(h_grid) :]


def _kernel(g: Tensor, h: Tensor) -> Tensor:
    return 1 / (1 + g * h)


def _grid(values: Tensor, largest_other: float) -> Tensor:
    """Values over the whole range, evenly spaced in their logarithm; below what is free all are alike."""
    highest = float(values.max())
    if highest * largest_other <= _FREE:
        return values.new_tensor([0.0])
    lowest = max(float(values.min()), _FREE / largest_other)
    count = 2 + math.ceil(_PER_DECADE * math.log10(highest / lowest))
    steps = torch.linspace(0, 1, count, dtype=torch.float64, device=values.device)
    return lowest * (highest / lowest) ** steps
