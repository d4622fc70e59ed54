"""The largest budget whose measured safety KL stays under a limit, found in few measurements."""

import math
from collections.abc import Callable

from deltaguard.report.restore import Probe

CLOSE = 0.9
"""A safety KL between this share of the limit and the limit ends the search."""

MOST_PROBES = 8

_AIM = 0.95
_FIRST_STEP = 4.0


def search(
    measure: Callable[[float], Probe], predicted: Callable[[float], float], limit: float, *, start: float
) -> tuple[Probe, ...]:
    """Look for the smallest price μ whose measured safety KL is at most `limit`.

    Safety KL falls as the price rises. What is predicted for a price gives the shape of that fall; each
    measurement corrects its scale, and brackets the answer. A guess outside the bracket gives way to the
    bracket's geometric middle.

    Args:
        measure: measures a price.
        predicted: the safety KL predicted for a price, positive and falling.
        limit: nats per response token, above 0.
        start: the first price to measure.

    Returns:
        All probes, in the order measured. At least one is safe, unless even `MOST_PROBES` of them, the price
        rising fast, were not.

    Example:
        >>> probes = search(lambda mu: Probe(mu=mu, safety_kl=2 / mu), lambda mu: 1 / mu, 0.5, start=1.0)
        >>> [round(probe.safety_kl, 3) for probe in probes]
        [2.0, 0.475]
    """
    probes: list[Probe] = []
    unsafe, safe, price = 0.0, math.inf, start
    while len(probes) < MOST_PROBES:
        probe = measure(price)
        probes.append(probe)
        if CLOSE * limit <= probe.safety_kl <= limit:
            break
        unsafe, safe = (price, safe) if probe.safety_kl > limit else (unsafe, price)
        price = _next(probe, predicted, limit, unsafe, safe)
    return tuple(probes)


def best(probes: tuple[Probe, ...], limit: float) -> Probe | None:
    """The probe that keeps most among those within the limit."""
    return min((p for p in probes if p.safety_kl <= limit), key=lambda probe: probe.mu, default=None)


def _next(
    probe: Probe, predicted: Callable[[float], float], limit: float, unsafe: float, safe: float
) -> float:
    scale = max(probe.safety_kl, limit / 100) / predicted(probe.mu)
    guess = _price_of(predicted, _AIM * limit / scale, around=probe.mu)
    if unsafe < guess < safe:
        return guess
    if math.isinf(safe):
        return unsafe * _FIRST_STEP
    return safe / _FIRST_STEP if unsafe == 0 else math.sqrt(unsafe * safe)


def _price_of(predicted: Callable[[float], float], wanted: float, *, around: float) -> float:
    """The price at which so much is predicted, by halving on a logarithmic scale."""
    low, high = around * 1e-6, around * 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted(middle) > wanted else (low, middle)
    return high
