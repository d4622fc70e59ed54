"""The closed form for a delta that is held as a product of thin matrices, as a LoRA adapter holds it.

Δ = B A of rank r has UᵀΔV = (UᵀB)(AV): projecting it costs r columns and r rows instead of a whole matrix.
The factors 1 / (1 + μ g_a h_b) are a sum of k products p_a q_b, so the restored delta is a sum of k products
of rank r, (U p Uᵀ B)(A V q Vᵀ). Where k r is not below the layer's shorter side, the matrix itself is solved.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deltaguard.solvers.directions import Directions, directions
from deltaguard.solvers.low_rank import LowRank
from deltaguard.solvers.profile import PROHIBITIVE
from deltaguard.solvers.separable import separable
from deltaguard.solvers.spectrum import Spectrum


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
    """

    up: Tensor
    down: Tensor
    inputs: Spectrum
    outputs: Spectrum
    left: Tensor
    right: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """In which everything is computed."""
        return self.up.dtype

    @cached_property
    def directions(self) -> Directions:
        """The delta by prices."""
        up, down = (matrix.double() for matrix in (self.up.T @ self.up, self.down @ self.down.T))
        left, right = self.left.double(), self.right.double()
        rows, columns = ((left @ down) * left).sum(1), ((up @ right) * right).sum(0)
        return directions(self.left @ self.right, rows, columns, (up * down).sum(), self.inputs, self.outputs)

    def restored(self, mu: float) -> Tensor:
        """Δ', (out, in)."""
        factors = self.factors(mu)
        return self._dense(mu) if factors is None else factors.up @ factors.down

    def factors(self, mu: float) -> LowRank | None:
        """Δ' as a product, None where that would be no thinner than the matrix itself."""
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
        """Of the parts inside and outside the two bases, only the one inside both is no thin product."""
        g, h, dtype = self.outputs.values, self.inputs.values, self.dtype
        of_rows = 1 / (1 + mu * g * self.inputs.tail)
        of_columns = 1 / (1 + mu * h * self.outputs.tail)
        neither = 1 / (1 + mu * self.outputs.tail * self.inputs.tail)
        inside = 1 / (1 + mu * torch.outer(g, h)) - of_rows[:, None] - of_columns[None, :] + neither
        u, v = self.outputs.vectors.to(dtype), self.inputs.vectors.to(dtype)
        rows = torch.addmm(neither * self.up, u, self.left * (of_rows - neither)[:, None])
        columns = (self.right * (of_columns - neither)) @ v.T
        found = torch.cat([rows, self.up], 1) @ torch.cat([self.down, columns])
        return found.addmm_(u, (self.left @ self.right * inside) @ v.T)


def project_thin(up: Tensor, down: Tensor, inputs: Spectrum, outputs: Spectrum) -> ThinProjection:
    """Project a delta up @ down, (out, r) and (r, in), on the eigenvectors of H and G."""
    inputs, outputs = inputs.to(up.dtype), outputs.to(up.dtype)
    return ThinProjection(up, down, inputs, outputs, outputs.vectors.T @ up, down @ inputs.vectors)


def _with_tail(found: Spectrum) -> Tensor:
    """All eigenvalues that occur: a whole spectrum has no directions beside the kept ones."""
    whole = len(found.values) == found.size
    return found.values if whole else torch.cat([found.values, found.values.new_tensor([found.tail])])


def _filtered(factor: Tensor, inside: Tensor, vectors: Tensor, terms: Tensor) -> Tensor:
    """Each term's function of the curvature, applied to a factor.

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
