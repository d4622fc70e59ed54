"""The largest budget whose measured safety KL stays under a limit, found in few measurements."""

import math
from collections.abc import Callable, Sequence

from deltaguard.reports.records.dial import AT_LIMIT, Probe

Judge = Callable[[Probe], float]
"""What of a measurement must be within the limit."""

MOST_PROBES = 8

_AIM = 0.95
_STEP = 4.0
_LEAST = 1e-200
_SPREAD = 3.0
"""Factor in the predicted safety KL between prices that are measured at once while an end is not known."""

_NEARER = 1 / 4
"""Share of the way to an end that is known, on a logarithmic scale, of the first price on its side."""

_FREE = 1e-6
"""A price that is lowered by this factor is as good as no price."""


def mean(probe: Probe) -> float:
    """Judge a measurement by its mean."""
    return probe.safety_kl


def search(
    measure: Callable[[Sequence[float]], Sequence[Probe]],
    predicted: Callable[[float], float],
    limit: float,
    *,
    start: float,
    at_once: int = 1,
    judge: Judge = mean,
) -> tuple[Probe, ...]:
    """Look for the smallest price μ whose measured safety KL is at most `limit`.

    Safety KL falls as the price rises. What is predicted for a price gives the shape of that fall. While all
    that was measured lies on one side of the limit, the last measurement corrects its scale, and steps grow;
    between a price that is too low and one that is high enough, both measurements correct it. Where several
    prices are measured at once, they lie around the one that would be measured alone, the closer the more is
    known.

    Args:
        measure: measures prices.
        predicted: the safety KL predicted for a price, positive and falling.
        limit: nats per response token, above 0.
        start: the first price to measure.
        at_once: how many prices to measure each time.
        judge: what of a measurement must be within the limit.

    Returns:
        All probes, in the order measured. One of the last `at_once` is close to the limit or keeps the whole
        delta, unless it was measured `MOST_PROBES` times. At least one is within the limit if prices a
        billion times `start` and above are.

    Example:
        >>> def measure(prices):
        ...     return [Probe(mu=mu, safety_kl=2 / mu) for mu in prices]
        >>> probes = search(measure, lambda mu: 1 / mu, 0.5, start=1.0)
        >>> [round(probe.safety_kl, 3) for probe in probes]
        [2.0, 0.475]
    """
    probes: list[Probe] = []
    price = _foretold(start, predicted)
    for times in range(1, MOST_PROBES + 1):
        prices = _around(price, _bracket(probes, limit, judge), predicted, at_once)
        new = [mu for mu in prices if all(probe.mu != mu for probe in probes)]
        if not new:
            break
        probes += measure(new)
        found = best(probes, limit, judge)
        if found is not None and _ends(found, predicted, limit, judge):
            break
        price = _foretold(_next(probes, times, predicted, limit, judge), predicted)
    return tuple(probes)


def _ends(found: Probe, predicted: Callable[[float], float], limit: float, judge: Judge) -> bool:
    """Say whether nothing is to be gained by a lower price than one that is within the limit."""
    free = predicted(found.mu * _FREE) < 1.01 * predicted(found.mu)
    return judge(found) >= AT_LIMIT * limit or free


def best(probes: Sequence[Probe], limit: float, judge: Judge = mean) -> Probe | None:
    """Find the probe that keeps most among those within the limit."""
    return min((p for p in probes if judge(p) <= limit), key=lambda probe: probe.mu, default=None)


def _foretold(price: float, predicted: Callable[[float], float]) -> float:
    """Lower a price until something is left of the delta to tell the next one by."""
    while predicted(price) < _LEAST and price > 0:
        price *= _FREE
    return price


def _bracket(probes: Sequence[Probe], limit: float, judge: Judge) -> tuple[Probe | None, Probe | None]:
    """Find the lowest price that is high enough, and the highest below it that is too low, this one first."""
    safe = best(probes, limit, judge)
    below = [p for p in probes if judge(p) > limit and (safe is None or p.mu < safe.mu)]
    return max(below, key=lambda probe: probe.mu, default=None), safe


def _next(
    probes: Sequence[Probe], times: int, predicted: Callable[[float], float], limit: float, judge: Judge
) -> float:
    unsafe, safe = _bracket(probes, limit, judge)
    if safe is not None and unsafe is not None:
        sides = [judge(probe) > limit for probe in probes[-3:]]
        # Three times in a row on one side: the other end is too far away to say much.
        if len(sides) == 3 and len(set(sides)) == 1:
            return math.sqrt(unsafe.mu * safe.mu)
        return _between(unsafe, safe, predicted, _AIM * limit, judge)
    last = unsafe or safe
    assert last is not None, "something was measured"  # noqa: S101
    scale = _seen(judge(last), limit) / predicted(last.mu)
    guess = _price_of(lambda mu: scale * predicted(mu), _AIM * limit, last.mu * _FREE, last.mu / _FREE)
    step = _STEP ** max(0, times - 2)
    return max(guess, last.mu * step) if unsafe else min(guess, last.mu / step)


def _around(
    price: float,
    bracket: tuple[Probe | None, Probe | None],
    predicted: Callable[[float], float],
    count: int,
) -> list[float]:
    """Spread prices around one: towards an end that is known, else where more or less is predicted."""
    found, distance = [price], 1
    while len(found) < count and price > 0:
        for end, more in zip(bracket, (_SPREAD**distance, _SPREAD**-distance), strict=True):
            if end is not None:
                found.append(price * (end.mu / price) ** _NEARER**distance)
            else:
                low, high = (price * _FREE, price) if more > 1 else (price, price / _FREE)
                found.append(_price_of(predicted, predicted(price) * more, low, high))
        distance += 1
    # One of which nothing is left could not tell the next one.
    return [price, *dict.fromkeys(mu for mu in found[1:count] if mu != price and predicted(mu) >= _LEAST)]


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
