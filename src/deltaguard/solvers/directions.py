"""A delta's squared parts in the eigenbases of its layer's curvature, however the delta is held."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.solvers.profile import PROHIBITIVE, Profile, profile
from deltaguard.solvers.solution import share
from deltaguard.solvers.spectrum import Spectrum

EXCESS = 0.01
"""Share of its norm that rounding, of eigenvectors to half precision above all, may add to a delta."""


@dataclass(frozen=True)
class Directions:
    """Directions of a delta with their eigenvalues; all (directions,), float64.

    Attributes:
        energies: squared parts of the delta.
        g: eigenvalues of G.
        h: eigenvalues of H.
        largest: the norm of the delta, ‖Δ‖, and what rounding may add to it.
    """

    energies: Tensor
    g: Tensor
    h: Tensor
    largest: float

    def profile(self) -> Profile:
        """How the squared delta is spread over prices g·h: all that a search for μ needs to know."""
        return profile(self.g * self.h, self.energies)

    def safety_cost(self, mu: float) -> float:
        """tr(Δ' H Δ'ᵀ) / tr(Δ H Δᵀ)."""
        dear = mu >= PROHIBITIVE
        kept = torch.zeros_like(self.g) if dear else 1 / (1 + mu * self.g * self.h)
        whole = float((self.h * self.energies).sum())
        return share(float((self.h * self.energies * kept.square()).sum()), whole)

    def check_restored(self, norm: float) -> None:
        """Refuse a restored delta that is larger than the delta.

        Each direction keeps the share 1 / (1 + μ g h) of itself, so there is none at any price.

        Args:
            norm: ‖Δ'‖.

        Raises:
            ValueError: the curvature, or the arithmetic, is not what it should be.
        """
        if not norm <= self.largest:
            raise ValueError(
                f"The restored delta is larger than the delta: its norm is {norm:.4g}, and no price leaves "
                f"more than {self.largest:.4g}. The curvature is damaged, or the device computes wrongly."
            )


def directions(
    core: Tensor,
    rows: Tensor,
    columns: Tensor,
    whole: Tensor,
    inputs: Spectrum,
    outputs: Spectrum,
    *,
    slack: float = 0.0,
) -> Directions:
    """Every direction inside both of two eigenbases, inside one of them, and outside both.

    Args:
        core: UᵀΔV, (r_g, r_h), with U and V the kept eigenvectors of G and H.
        rows: squared norms of the rows of UᵀΔ, (r_g,).
        columns: squared norms of the columns of ΔV, (r_h,).
        whole: ‖Δ‖², one number.
        inputs: of H, rank r_h.
        outputs: of G, rank r_g.
        slack: what rounding may add to norms besides, where the delta is a difference of larger matrices.

    Raises:
        ValueError: eigenvalues are negative or no numbers, or the eigenvectors are not orthonormal: a part of
            the delta is larger than the delta.
    """
    for found in (inputs, outputs):
        _check_eigenvalues(found)
    squares = core.double().square()
    largest = (1 + EXCESS) * math.sqrt(float(whole)) + slack
    for part in (rows.sum(), columns.sum(), squares.sum()):
        if not math.sqrt(float(part)) <= largest:
            raise ValueError(
                f"The curvature's eigenvectors are not orthonormal: the delta's norm is {largest:.4g} at "
                f"most, and that of its part in them {math.sqrt(float(part)):.4g}. The curvature is damaged."
            )
    of_rows = (rows - squares.sum(1)).clamp_min(0)
    of_columns = (columns - squares.sum(0)).clamp_min(0)
    rest = (whole - of_rows.sum() - of_columns.sum() - squares.sum()).clamp_min(0)
    g, h = outputs.values.double(), inputs.values.double()
    g_tail, h_tail = squares.new_tensor([outputs.tail]), squares.new_tensor([inputs.tail])
    return Directions(
        torch.cat([squares.flatten(), of_rows, of_columns, rest.reshape(1)]),
        torch.cat([g.repeat_interleave(len(h)), g, g_tail.expand(len(h)), g_tail]),
        torch.cat([h.repeat(len(g)), h_tail.expand(len(g)), h, h_tail]),
        largest,
    )


def _check_eigenvalues(found: Spectrum) -> None:
    all_values = torch.cat([found.values.double(), found.values.new_tensor([found.tail]).double()])
    bad = ~((all_values >= 0) & all_values.isfinite())
    if bool(bad.any()):
        raise ValueError(
            f"The curvature has the eigenvalue {float(all_values[bad][0])}; all must be finite and 0 or more."
        )
