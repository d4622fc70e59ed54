"""A delta's squared parts in the eigenbases of its layer's curvature, however the delta is held."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.solvers.profile import PROHIBITIVE, Profile, profile
from deltaguard.solvers.solution import share
from deltaguard.solvers.spectrum import Spectrum


@dataclass(frozen=True)
class Directions:
    """Directions of a delta with their eigenvalues; all (directions,), float64.

    Attributes:
        energies: squared parts of the delta.
        g: eigenvalues of G.
        h: eigenvalues of H.
    """

    energies: Tensor
    g: Tensor
    h: Tensor

    def profile(self) -> Profile:
        """How the squared delta is spread over prices g·h: all that a search for μ needs to know."""
        return profile(self.g * self.h, self.energies)

    def safety_cost(self, mu: float) -> float:
        """tr(Δ' H Δ'ᵀ) / tr(Δ H Δᵀ)."""
        dear = mu >= PROHIBITIVE
        kept = torch.zeros_like(self.g) if dear else 1 / (1 + mu * self.g * self.h)
        whole = float((self.h * self.energies).sum())
        return share(float((self.h * self.energies * kept.square()).sum()), whole)


def directions(
    core: Tensor, rows: Tensor, columns: Tensor, whole: Tensor, inputs: Spectrum, outputs: Spectrum
) -> Directions:
    """Every direction inside both of two eigenbases, inside one of them, and outside both.

    Args:
        core: UᵀΔV, (r_g, r_h), with U and V the kept eigenvectors of G and H.
        rows: squared norms of the rows of UᵀΔ, (r_g,).
        columns: squared norms of the columns of ΔV, (r_h,).
        whole: ‖Δ‖², one number.
        inputs: of H, rank r_h.
        outputs: of G, rank r_g.
    """
    squares = core.double().square()
    of_rows = (rows - squares.sum(1)).clamp_min(0)
    of_columns = (columns - squares.sum(0)).clamp_min(0)
    rest = (whole - of_rows.sum() - of_columns.sum() - squares.sum()).clamp_min(0)
    g, h = outputs.values.double(), inputs.values.double()
    g_tail, h_tail = squares.new_tensor([outputs.tail]), squares.new_tensor([inputs.tail])
    return Directions(
        torch.cat([squares.flatten(), of_rows, of_columns, rest.reshape(1)]),
        torch.cat([g.repeat_interleave(len(h)), g, g_tail.expand(len(h)), g_tail]),
        torch.cat([h.repeat(len(g)), h_tail.expand(len(g)), h, h_tail]),
    )
