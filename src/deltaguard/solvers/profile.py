"""A delta's squared parts in the eigenbases of its layer's curvature, and how they spread over prices."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deltaguard.solvers.solution import share
from deltaguard.solvers.spectrum import Spectrum

_BINS_PER_OCTAVE = 32
_HIGHEST = 2.0**200
"""Beyond this price no μ of the search tells directions apart."""

_HALVINGS = 200

PROHIBITIVE = 1e30
"""From this price on nothing is left of a delta: infinity, as float32 and JSON can hold it."""

EXCESS = 0.01
"""Share of its norm that rounding, of eigenvectors to half precision above all, may add to a delta."""


@dataclass(frozen=True)
class Profile:
    """‖Δ‖² by price, of one layer or of many: a direction of price w keeps the share 1 / (1 + μw) of itself.

    Prices within a 32nd of an octave are put together at their mean, weighted by what lies there: the error
    is of second order, about 1e-4.

    Attributes:
        prices: (bins,), g·h, float64, on the CPU; 0 or more.
        energies: (bins,), ‖Δ‖² in directions of that price, likewise.
    """

    prices: Tensor
    energies: Tensor

    @property
    def energy(self) -> float:
        """The squared norm of the delta, ‖Δ‖²."""
        return float(self.energies.sum())

    def predicted_kl(self, mu: float) -> float:
        """Compute ½ tr(G Δ' H Δ'ᵀ): nats per response token where G and H are those of a store."""
        return 0.5 * float((self.prices * self.energies * _kept_share(self.prices, mu).square()).sum())

    def lost(self, mu: float) -> float:
        """Compute ‖Δ' - Δ‖²."""
        return float((self.energies * (1 - _kept_share(self.prices, mu)).square()).sum())

    def kept(self, mu: float) -> float:
        """Compute ⟨Δ', Δ⟩."""
        return float((self.energies * _kept_share(self.prices, mu)).sum())

    def mu_of_share(self, strength: float) -> float:
        """Find the μ at which the predicted safety KL is the share `strength` of the fine-tuned delta's.

        Args:
            strength: in [0, 1]; 0 gives `PROHIBITIVE` and 1 gives 0.

        Raises:
            ValueError: it lies elsewhere.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must lie in [0, 1].")
        if strength == 0:
            return PROHIBITIVE
        whole = self.predicted_kl(0)
        if strength == 1 or whole == 0:
            return 0.0
        low, high = 1 / PROHIBITIVE, PROHIBITIVE
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.predicted_kl(middle) > strength * whole else (low, middle)
        return high


def shares_of_parts(inputs: Spectrum, outputs: Spectrum, mu: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Compute what is kept of the four parts of a delta, each beyond what the parts around it keep.

    Args:
        inputs: of H, rank r_h.
        outputs: of G, rank r_g.
        mu: the price of safety.

    Returns:
        For UᵀΔV, (r_g, r_h); for the rows of UᵀΔ, (r_g,); for the columns of ΔV, (r_h,); and for Δ.
    """
    g, h = outputs.values, inputs.values
    of_rows = 1 / (1 + mu * g * inputs.tail)
    of_columns = 1 / (1 + mu * h * outputs.tail)
    neither = 1 / (1 + mu * outputs.tail * inputs.tail)
    both = 1 / (1 + mu * torch.outer(g, h)) - of_rows[:, None] - of_columns[None, :] + neither
    return both, of_rows - neither, of_columns - neither, neither


def _kept_share(prices: Tensor, mu: float) -> Tensor:
    return torch.zeros_like(prices) if mu >= PROHIBITIVE else 1 / (1 + mu * prices)


def profile(prices: Tensor, energies: Tensor) -> Profile:
    """Put directions of about the same price together.

    Args:
        prices: (directions,), 0 or more.
        energies: (directions,), squared parts of the delta in them.

    Example:
        >>> import torch
        >>> found = profile(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 3.0, 1.0]))
        >>> found.prices.tolist(), found.energies.tolist()
        ([1.0, 2.0], [4.0, 1.0])
    """
    prices, energies = prices.double().clamp_max(_HIGHEST), energies.double()
    bins = torch.where(
        prices > 0, (prices.log2() * _BINS_PER_OCTAVE).floor(), torch.full_like(prices, -math.inf)
    )
    _, index = torch.unique(bins, return_inverse=True)
    # A GPU adds up in no fixed order.
    index, weights = index.cpu(), (energies * prices).cpu()
    summed, weighted = torch.bincount(index, energies.cpu()), torch.bincount(index, weights)
    filled = summed > 0
    return Profile(weighted[filled] / summed[filled], summed[filled])


def joint_profile(profiles: Iterable[Profile]) -> Profile:
    """Join the profiles of several layers, for which one μ is looked for.

    Example:
        >>> import torch
        >>> one = profile(torch.tensor([2.0]), torch.tensor([1.0]))
        >>> joint_profile([one, one]).energy
        2.0
    """
    parts = list(profiles)
    nothing = torch.empty(0, dtype=torch.float64)
    return profile(
        torch.cat([nothing, *(p.prices for p in parts)]), torch.cat([nothing, *(p.energies for p in parts)])
    )


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
        """Sort the squared delta by its prices g·h: all that a search for μ needs to know."""
        return self._profile

    @cached_property
    def _profile(self) -> Profile:
        # Sorting costs more than all else at a price, and serves every one.
        return profile(self.g * self.h, self.energies)

    def kept(self, mu: float) -> Tensor:
        """Compute the share of itself that each direction keeps, (directions,)."""
        return _kept_share(self.g * self.h, mu)

    def safety_cost(self, mu: float, more: float = 0.0) -> float:
        """Compute tr(Δ' H Δ'ᵀ) / tr(Δ H Δᵀ).

        Args:
            mu: the price of safety.
            more: what is added to tr(Δ' H Δ'ᵀ), see `Taken`.
        """
        whole = float((self.h * self.energies).sum())
        return share(float((self.h * self.energies * self.kept(mu).square()).sum()) + more, whole)

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
    """List the directions inside both of two eigenbases, inside one of them, and outside both.

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
    squares = core.double().square()
    g, h = outputs.values.double(), inputs.values.double()
    g_tail, h_tail = squares.new_tensor([outputs.tail]), squares.new_tensor([inputs.tail])
    eigenvalues = torch.cat([h, h_tail, g, g_tail])
    bad = eigenvalues[~((eigenvalues >= 0) & eigenvalues.isfinite())]
    if len(bad):
        raise ValueError(
            f"The curvature has the eigenvalue {float(bad[0])}; all must be finite and 0 or more."
        )
    largest = (1 + EXCESS) * math.sqrt(max(float(whole), 0.0)) + slack
    for part in (rows.sum(), columns.sum(), squares.sum()):
        # Sums of a product whose factors cancel may come out below 0.
        if not (norm := math.sqrt(max(float(part), 0.0))) <= largest:
            raise ValueError(
                f"The curvature's eigenvectors are not orthonormal: the delta's norm is {largest:.4g} at "
                f"most, and that of its part in them {norm:.4g}. The curvature is damaged."
            )
    of_rows = (rows - squares.sum(1)).clamp_min(0)
    of_columns = (columns - squares.sum(0)).clamp_min(0)
    rest = (whole - of_rows.sum() - of_columns.sum() - squares.sum()).clamp_min(0)
    return Directions(
        torch.cat([squares.flatten(), of_rows, of_columns, rest.reshape(1)]),
        torch.cat([g.repeat_interleave(len(h)), g, g_tail.expand(len(h)), g_tail]),
        torch.cat([h.repeat(len(g)), h_tail.expand(len(g)), h, h_tail]),
        largest,
    )
