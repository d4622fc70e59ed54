"""How a delta is spread over the prices of safety: the little that a search for one global μ needs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_BINS_PER_OCTAVE = 32
_HIGHEST = 2.0**200
"""Beyond this price no μ of the search tells directions apart."""

_HALVINGS = 200

PROHIBITIVE = 1e30
"""From this price on nothing is left of a delta: infinity, as float32 and JSON can hold it."""


@dataclass(frozen=True)
class Profile:
    """‖Δ‖² by price, of one layer or of many: a direction of price w keeps the share 1 / (1 + μw) of itself.

    Prices within a 32nd of an octave are put together at their mean, weighted by what lies there: the error
    is of second order, about 1e-4.

    Attributes:
        prices: (bins,), g·h, float64; 0 or more.
        energies: (bins,), ‖Δ‖² in directions of that price, float64.
    """

    prices: Tensor
    energies: Tensor

    @property
    def energy(self) -> float:
        """‖Δ‖²."""
        return float(self.energies.sum())

    def predicted_kl(self, mu: float) -> float:
        """½ tr(G Δ' H Δ'ᵀ): nats per response token where G and H are those of a store."""
        return 0.5 * float((self.prices * self.energies * self._shares(mu).square()).sum())

    def lost(self, mu: float) -> float:
        """‖Δ' - Δ‖²."""
        return float((self.energies * (1 - self._shares(mu)).square()).sum())

    def kept(self, mu: float) -> float:
        """⟨Δ', Δ⟩."""
        return float((self.energies * self._shares(mu)).sum())

    def mu_of_share(self, strength: float) -> float:
        """The μ at which the predicted safety KL is the share `strength` of the whole delta's.

        Args:
            strength: in [0, 1]; 0 gives `PROHIBITIVE` and 1 gives 0.

        Raises:
            ValueError: it lies elsewhere.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must lie in [0, 1].")
        whole = self.predicted_kl(0)
        if strength == 1 or whole == 0:
            return 0.0
        if strength == 0:
            return PROHIBITIVE
        low, high = 1 / PROHIBITIVE, PROHIBITIVE
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.predicted_kl(middle) > strength * whole else (low, middle)
        return high

    def _shares(self, mu: float) -> Tensor:
        if mu >= PROHIBITIVE:
            return torch.zeros_like(self.prices)
        return 1 / (1 + mu * self.prices)


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
    summed = torch.bincount(index, energies)
    weighted = torch.bincount(index, energies * prices)
    filled = summed > 0
    return Profile(weighted[filled] / summed[filled], summed[filled])


def joint_profile(profiles: Iterable[Profile]) -> Profile:
    """That of all layers together."""
    parts = list(profiles)
    nothing = torch.empty(0, dtype=torch.float64)
    return profile(
        torch.cat([nothing, *(p.prices for p in parts)]), torch.cat([nothing, *(p.energies for p in parts)])
    )
