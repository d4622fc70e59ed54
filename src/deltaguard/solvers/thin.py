"""The closed form for a delta that is held as a product of thin matrices, as a LoRA adapter holds it.

Δ = B A of rank r has UᵀΔV = (UᵀB)(AV): projecting it costs r columns and r rows instead of a whole matrix.
The factors 1 / (1 + μ g_a h_b) are a sum of k products p_a q_b, so the restored delta is a sum of k products
of rank r, (U p Uᵀ B)(A V q Vᵀ). Where k r is not below the layer's shorter side, the matrix itself is solved.

The factors depend on log g + log h alone and change over a few decades, so that as a matrix over any values
of g and h they are numerically of low rank. Cross approximation (Bebendorf 2000, doi:10.1007/PL00005410)
finds the terms: it takes the entry where the error is largest and subtracts its row and column, until none is
left.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaguard.solvers.low_rank import LowRank
from deltaguard.solvers.profile import PROHIBITIVE, Directions, directions, shares_of_parts
from deltaguard.solvers.solution import squared_norm
from deltaguard.solvers.spectrum import Spectrum

if TYPE_CHECKING:
    from deltaguard.solvers.level import Level

_ROUNDING = 1e-4
"""Of ‖B‖ ‖A‖, what a sum of products in float32 may be off by."""

_TOLERANCE = 1e-6
"""Largest error of a factor 1 / (1 + μ g h), which lies in [0, 1]: below the rounding of half precision."""
_FREE = 1e-3 * _TOLERANCE
"""A price below this is as good as none."""
_PER_DECADE = 16
"""Values of g and of h at which the largest error is looked for."""


@dataclass(frozen=True)
class ThinProjection:
    """A delta up @ down seen in the eigenbases of its layer's curvature: made once, it serves every μ.

    Attributes:
        up: B, (out, r).
        down: A, (r, in).
        inputs: of H, rank r_h.
        outputs: of G, rank r_g.
        left: UᵀB, (r_g, r).
        right: AV, (r, r_h).
        directions: the delta by prices.
        level: what the restored delta is orthogonal to.
    """

    up: Tensor
    down: Tensor
    inputs: Spectrum
    outputs: Spectrum
    left: Tensor
    right: Tensor
    directions: Directions
    level: "Level | None" = None

    @property
    def dtype(self) -> torch.dtype:
        """In which everything is computed."""
        return self.up.dtype

    def restored(self, mu: float, onto: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Compute Δ', (out, in).

        Args:
            mu: the price of safety.
            onto: a matrix that it is added to, (out, in), which stays as it is.
            dtype: what the result is rounded to; as it is computed where absent.

        Raises:
            ValueError: it would be larger than Δ, see `Directions.check_restored`.
        """
        factors = self.factors(mu)
        found = self._dense(mu) if factors is None else factors.up @ factors.down
        if self.level is not None:
            found.addmm_(self.level.up, self.level.down, alpha=-self.level.along(self.directions, mu))
        self.directions.check_restored(math.sqrt(squared_norm(found)))
        return (found if onto is None else found.add_(onto.to(self.dtype))).to(dtype or self.dtype)

    def along(self, found: LowRank) -> float:
        """Compute ⟨found, Δ⟩, of another delta that is held as a product."""
        return float(((self.up.T @ found.up) * (self.down @ found.down.T)).double().sum())

    def factors(self, mu: float) -> LowRank | None:
        """Compute Δ' as a product, None where that would be no thinner than the matrix itself.

        It is not orthogonal to what `level` says: whoever cuts it off would lose that again.

        The norm of a product costs nearly as much as the product: whoever has it at hand after the next step
        gives it to `directions.check_restored`.
        """
        if mu == 0:
            return LowRank(self.down, self.up, 0.0)
        if mu >= PROHIBITIVE:
            return LowRank(self.down[:0], self.up[:, :0], 0.0)
        of_g, of_h = separable(_with_tail(self.outputs), _with_tail(self.inputs), mu)
        if of_g.shape[1] * self.up.shape[1] >= min(self.up.shape[0], self.down.shape[1]):
            return None
        up = _filtered(self.up, self.left, self.outputs.vectors, of_g.to(self.dtype))
        down = _filtered(self.down.T, self.right.T, self.inputs.vectors, of_h.to(self.dtype))
        return LowRank(down.T, up, 0.0)

    def _dense(self, mu: float) -> Tensor:
        """Compute Δ' as a matrix: of its four parts, only the one inside both bases is no thin product."""
        both, of_rows, of_columns, of_all = shares_of_parts(self.inputs, self.outputs, mu)
        u, vt = self.outputs.vectors.to(self.dtype), self.inputs.vectors.T.to(self.dtype)
        rows = torch.addmm(of_all * self.up, u, self.left * of_rows[:, None])
        columns = (self.right * of_columns) @ vt
        found = torch.cat([rows, self.up], 1) @ torch.cat([self.down, columns])
        return found.addmm_(u, (self.left @ self.right * both) @ vt)


def project_thin(up: Tensor, down: Tensor, inputs: Spectrum, outputs: Spectrum) -> ThinProjection:
    """Project a delta up @ down, (out, r) and (r, in), on the eigenvectors of H and G.

    Raises:
        ValueError: eigenvalues are negative or no numbers, or eigenvectors not orthonormal.
    """
    inputs, outputs = inputs.to(up.dtype), outputs.to(up.dtype)
    left, right = outputs.vectors.T @ up, down @ inputs.vectors
    # In float64: the terms of a product may cancel, all but a little.
    of_up, of_down = (matrix.double() @ matrix.double().T for matrix in (up.T, down))
    rows = ((left.double() @ of_down) * left).sum(1)
    columns = ((of_up @ right.double()) * right).sum(0)
    slack = _ROUNDING * math.sqrt(float(of_up.trace() * of_down.trace()))
    found = directions(left @ right, rows, columns, (of_up * of_down).sum(), inputs, outputs, slack=slack)
    return ThinProjection(up, down, inputs, outputs, left, right, found)


def _with_tail(found: Spectrum) -> Tensor:
    """List all eigenvalues that occur: where all eigenpairs are kept, there is no tail."""
    if len(found.values) == found.size:
        return found.values
    return torch.cat([found.values, found.values.new_tensor([found.tail])])


def _filtered(factor: Tensor, inside: Tensor, vectors: Tensor, terms: Tensor) -> Tensor:
    """Apply each term's function of the curvature to a factor.

    Args:
        factor: (n, r).
        inside: its part in the basis, vectorsᵀ factor, (rank, r).
        vectors: of the curvature, (n, rank).
        terms: each term's function at the kept eigenvalues and, where others occur, last at the tail,
            (rank, k) or (rank + 1, k).

    Returns:
        (n, k r), term by term.
    """
    rank = vectors.shape[1]
    tail = terms[rank] if len(terms) > rank else torch.zeros_like(terms[0])
    scaled = ((terms[:rank] - tail)[:, :, None] * inside[:, None, :]).flatten(1)
    return torch.addmm((tail[:, None] * factor[:, None, :]).flatten(1), vectors.to(factor.dtype), scaled)


def separable(g: Tensor, h: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Find P and Q with P Qᵀ ≈ 1 / (1 + μ g hᵀ), no entry off by more than about 1e-6.

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
    """Space values over the range evenly in their logarithm; those that are free count as one."""
    highest = float(values.max())
    if highest * largest_other <= _FREE:
        return values.new_tensor([0.0])
    lowest = max(float(values.min()), _FREE / largest_other)
    count = 2 + math.ceil(_PER_DECADE * math.log10(highest / lowest))
    steps = torch.linspace(0, 1, count, dtype=torch.float64, device=values.device)
    return lowest * (highest / lowest) ** steps
