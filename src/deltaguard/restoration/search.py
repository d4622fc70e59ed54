"""The largest budget whose measured safety KL stays under a limit, found in few measurements."""

import math
from collections.abc import Callable, Sequence

from deltaguard.reports.records.restore import Probe

Judge = Callable[[Probe], float]
"""What of a measurement must be within the limit."""

CLOSE = 0.9
"""A safety KL between this share of the limit and the limit ends the search."""

MOST_PROBES = 8

_AIM = 0.95
_STEP = 4.0
_LEAST = 1e-200
_FREE = 1e-6
"""A price that is lowered by this factor is as good as no price."""


def mean(probe: Probe) -> float:
    """Judge a measurement by its mean."""
    return probe.safety_kl


def search(
    measure: Callable[[float], Probe],
    predicted: Callable[[float], float],
    limit: float,
    *,
    start: float,
    judge: Judge = mean,
) -> tuple[Probe, ...]:
    """Look for the smallest price μ whose measured safety KL is at most `limit`.

    Safety KL falls as the price rises. What is predicted for a price gives the shape of that fall. While all
    that was measured lies on one side of the limit, the last measurement corrects its scale, and steps grow;
    between a price that is too low and one that is high enough, both measurements correct it.

    Args:
        measure: measures a price.
        predicted: the safety KL predicted for a price, positive and falling.
        limit: nats per response token, above 0.
        start: the first price to measure.
        judge: what of a measurement must be within the limit.

    Returns:
        All probes, in the order measured. The last is close to the limit or keeps the whole delta, unless
        there are `MOST_PROBES` of them. At least one is within the limit if prices a billion times `start`
        and above are.

    Example:
        >>> probes = search(lambda mu: Probe(mu=mu, safety_kl=2 / mu), lambda mu: 1 / mu, 0.5, start=1.0)
        >>> [round(probe.safety_kl, 3) for probe in probes]
        [2.0, 0.475]
    """
    probes: list[Probe] = []
    price = _foretold(start, predicted)
    while len(probes) < MOST_PROBES and all(probe.mu != price for probe in probes):
        probe = measure(price)
        probes.append(probe)
        found = judge(probe)
        if found <= limit and (found >= CLOSE * limit or predicted(price * _FREE) < 1.01 * predicted(price)):
            break
        price = _foretold(_next(probes, predicted, limit, judge), predicted)
    return tuple(probes)


def best(probes: Sequence[Probe], limit: float, judge: Judge = mean) -> Probe | None:
    """Find the probe that keeps most among those within the limit."""
    return min((p for p in probes if judge(p) <= limit), key=lambda probe: probe.mu, default=None)


def _foretold(price: float, predicted: Callable[[float], float]) -> float:
    """Lower a price until something is left of the delta to tell the next one by."""
    while predicted(price) < _LEAST and price > 0:
        price *= _FREE
    return price


def _next(probes: Sequence[Probe], predicted: Callable[[float], float], limit: float, judge: Judge) -> float:
    last, safe = probes[-1], best(probes, limit, judge)
    above = [probe for probe in probes if judge(probe) > limit]
    if safe is not None and above:
        unsafe = max(above, key=lambda probe: probe.mu)
        sides = [judge(probe) > limit for probe in probes[-3:]]
        # Three times in a row on one side: the other end is too far away to say much.
        if len(sides) == 3 and len(set(sides)) == 1:
            return math.sqrt(unsafe.mu * safe.mu)
        return _between(unsafe, safe, predicted, _AIM * limit, judge)
    scale = _seen(judge(last), limit) / predicted(last.mu)
    guess = _price_of(lambda mu: scale * predicted(mu), _AIM * limit, last.mu * _FREE, last.mu / _FREE)
    step = _STEP ** max(0, len(probes) - 2)
    return max(guess, last.mu * step) if above else min(guess, last.mu / step)


def _between(
    unsafe: Probe, safe: Probe, predicted: Callable[[float], float], wanted: float, judge: Judge
) -> float:
    """Where `wanted` is expected once the prediction is bent so that it passes through both probes."""
    low, high = (math.log(_seen(judge(p), wanted) / predicted(p.mu)) for p in (unsafe, safe))
    slope = (high - low) / math.log(safe.mu / unsafe.mu)

    def expected(mu: float) -> float:
        return predicted(mu) * math.exp(low + slope * math.log(mu / unsafe.mu))

    return _price_of(expected, wanted, unsafe.mu, safe.mu)


def _seen(found: float, limit: float) -> float:
    """Say what was measured, which may be negative from rounding where it is about 0."""
    return max(found, limit / 100)


def _price_of(expected: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Find the price at which so much is expected, by halving on a logarithmic scale."""
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected(middle) > wanted else (low, middle)
    return high
