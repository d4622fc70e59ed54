"""The search for a price: laws on any falling curve, and how few measurements the usual ones take."""

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deltaguard.reports.records.dial import Probe
from deltaguard.restoration.search import AT_LIMIT, MOST_PROBES, best, search

SEEDS = st.integers(0, 10**6)


class Delta:
    """One that is spread over prices like those of a model: what is predicted of it, and a first price."""

    def __init__(self, seed):
        values = random.Random(seed)
        decades, lowest = values.uniform(2, 10), values.uniform(-6, -2)
        self.prices = [10 ** (lowest + decades * values.random()) for _ in range(60)]
        self.energies = [10 ** (-3 * values.random()) for _ in range(60)]
        self.whole = 1.0
        self.whole = self.predicted(0)
        self.limit = 10 ** values.uniform(-5, -0.5)
        self.start = self.price_of(self.limit)

    def predicted(self, mu):
        kept = zip(self.prices, self.energies, strict=True)
        return sum(w * e / (1 + mu * w) ** 2 for w, e in kept) / self.whole

    def price_of(self, wanted):
        low, high = 1e-20, 1e20
        for _ in range(80):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.predicted(middle) > wanted else (low, middle)
        return high

    def search(self, curve, at_once=1):
        """All probes of a curve, of how prices really are."""
        return search(each(curve), self.predicted, self.limit, start=self.start, at_once=at_once)


def each(curve, passes=None):
    """What measures the prices of a curve, and counts how often it was asked."""

    def measure(prices):
        if passes is not None:
            passes.append(len(prices))
        return [Probe(mu=mu, safety_kl=curve(mu)) for mu in prices]

    return measure


def bent(delta, power, by_price=1.0, by_kl=1.0):
    """A curve that falls faster or more slowly than predicted, elsewhere and from another height."""
    return lambda mu: by_kl * delta.predicted(delta.start * (by_price * mu / delta.start) ** power)


def noisy(curve, size, seed):
    """The same with every measurement off by up to a share, the same measurement always alike."""
    return lambda mu: curve(mu) * (1 + size * random.Random(f"{seed} {mu}").uniform(-1, 1))


FACTORS = st.floats(-3, 3).map(lambda power: 10**power)


@st.composite
def curves(draw):
    delta = Delta(draw(SEEDS))
    curve = bent(delta, draw(st.floats(0.25, 4)), draw(FACTORS), draw(FACTORS))
    floor = draw(st.sampled_from([0.0, 0.5, 0.85, 0.99])) * delta.limit
    steps = draw(st.booleans())

    def found(mu):
        return floor + curve(2 ** math.floor(math.log2(mu)) if steps else mu)

    return delta, found


AT_ONCE = st.sampled_from([1, 2, 4])


@given(curves(), AT_ONCE)
def test_a_price_within_the_limit_is_found_if_there_is_one(made, at_once):
    delta, curve = made
    assume(curve(1e9 * delta.start) <= delta.limit)
    found = best(delta.search(curve, at_once), delta.limit)
    assert found is not None
    assert found.safety_kl == curve(found.mu) <= delta.limit


@given(curves(), st.floats(0, 0.3), SEEDS, AT_ONCE)
def test_noise_does_not_lead_beyond_the_limit(made, size, seed, at_once):
    delta, curve = made
    assume((1 + size) * curve(1e9 * delta.start) <= delta.limit)
    found = best(delta.search(noisy(curve, size, seed), at_once), delta.limit)
    assert found is not None
    assert found.safety_kl <= delta.limit


@given(curves())
def test_each_price_lies_between_those_known_to_be_too_low_and_high_enough(made):
    delta, curve = made
    low, high = 0.0, math.inf
    for probe in delta.search(curve):
        assert low < probe.mu < high
        low, high = (probe.mu, high) if probe.safety_kl > delta.limit else (low, probe.mu)


@given(curves())
def test_the_search_ends_where_nothing_is_to_be_gained(made):
    delta, curve = made
    probes = delta.search(curve)
    assert 1 <= len(probes) <= MOST_PROBES

    def is_an_end(probe):
        close = AT_LIMIT * delta.limit <= probe.safety_kl <= delta.limit
        free = delta.predicted(probe.mu) > 0.99 * delta.predicted(0)
        return close or (free and probe.safety_kl <= delta.limit)

    assert not any(is_an_end(probe) for probe in probes[:-1])
    assert is_an_end(probes[-1]) or len(probes) == MOST_PROBES


@given(curves(), AT_ONCE)
def test_the_best_is_the_lowest_price_within_the_limit(made, at_once):
    delta, curve = made
    probes = delta.search(curve, at_once)
    found = best(probes, delta.limit)
    within = [probe.mu for probe in probes if probe.safety_kl <= delta.limit]
    assert (found is None) == (not within)
    if found is not None:
        assert found.mu == min(within)


@given(curves())
def test_prices_that_are_measured_at_once_lie_between_those_known_before(made):
    delta, curve = made
    low, high, told = 0.0, math.inf, []

    def measure(prices):
        nonlocal low, high
        assert len(prices) == len(set(prices)) <= 4
        assert all(low < mu < high for mu in prices)
        told.append(found := each(curve)(prices))
        high = min([high, *(p.mu for p in found if p.safety_kl <= delta.limit)])
        low = max([low, *(p.mu for p in found if p.safety_kl > delta.limit)])
        return found

    search(measure, delta.predicted, delta.limit, start=delta.start, at_once=4)
    assert 1 <= len(told) <= MOST_PROBES


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("start", [1e-30, 1.0, 1e28, 1e30, 1e60])
@pytest.mark.parametrize("limit", [1e-9, 1e-3, 1e3])
@pytest.mark.parametrize("floor", [-1e-10, 0.0, 1e-10, 1e-6])
def test_a_price_of_which_nothing_is_left_to_tell_from_ends_nothing(start, limit, floor, at_once):
    """As with a limit that is a tiny share of what the whole delta costs."""

    def predicted(mu):
        return 0.0 if mu >= 1e30 else 1e3 / (1 + 1e12 * mu) ** 2

    curve = each(lambda mu: floor + predicted(mu))
    probes = search(curve, predicted, limit, start=start, at_once=at_once)
    assert 1 <= len(probes) <= MOST_PROBES * at_once
    assert len({probe.mu for probe in probes}) == len(probes)


def test_a_delta_that_costs_less_than_numbers_can_tell():
    probes = search(each(lambda _: 1.0), lambda _: 1e-290, 0.5, start=1.0)
    assert best(probes, 0.5) is None


def test_without_a_price_within_the_limit_none_is_found():
    probes = search(each(lambda _: 2.0), lambda mu: 1 / (1 + mu), 1.0, start=1.0)
    assert len(probes) == MOST_PROBES
    assert probes[-1].mu >= 1e9
    assert best(probes, 1.0) is None


@pytest.mark.parametrize("rounded", [0.0, -1e-9])
def test_a_delta_that_costs_nothing_is_kept(rounded):
    """As where embeddings, which are not restored, were all that hurt."""
    delta = Delta(0)
    probes = delta.search(lambda _: rounded)
    assert len(probes) <= 3
    assert delta.predicted(probes[-1].mu) > 0.99 * delta.predicted(0)


@pytest.mark.parametrize(
    ("kind", "curve", "most", "mean"),
    [
        ("as predicted", lambda d: bent(d, 1), 1, 1),
        ("a thousand times higher", lambda d: bent(d, 1, by_kl=1e3), 2, 2),
        ("a thousand times lower", lambda d: bent(d, 1, by_kl=1e-3), 3, 2.5),
        ("falling at a thousandth of the price", lambda d: bent(d, 1, by_price=1e3), 7, 4),
        ("steeper", lambda d: bent(d, 2, by_kl=10), 4, 2.5),
        ("flatter", lambda d: bent(d, 0.5, by_kl=10), 6, 4),
        ("flatter and far off", lambda d: bent(d, 0.4, by_price=1e-3), 8, 5.5),
        ("noisy", lambda d: noisy(bent(d, 1.2, by_kl=3), 0.05, 0), 3, 2.2),
    ],
)
def test_fewer_passes_suffice_where_each_measures_four(kind, curve, most, mean):
    counts = []
    for seed in range(40):
        delta, passes = Delta(seed), []
        measure = each(curve(delta), passes)
        probes = search(measure, delta.predicted, delta.limit, start=delta.start, at_once=4)
        found = best(probes, delta.limit)
        counts.append(len(passes))
        whole = delta.predicted(found.mu) > 0.99 * delta.predicted(0)
        assert found.safety_kl >= AT_LIMIT * delta.limit or whole, (kind, seed)
    assert max(counts) <= most
    assert sum(counts) / len(counts) <= mean


@pytest.mark.parametrize(
    ("kind", "curve", "most", "mean"),
    [
        ("as predicted", lambda d: bent(d, 1), 2, 1.3),
        ("a thousand times higher", lambda d: bent(d, 1, by_kl=1e3), 2, 2),
        ("a thousand times lower", lambda d: bent(d, 1, by_kl=1e-3), 3, 3),
        ("falling at a thousandth of the price", lambda d: bent(d, 1, by_price=1e3), 7, 5.5),
        ("falling at a thousand times the price", lambda d: bent(d, 1, by_price=1e-3), 7, 5.5),
        ("steeper", lambda d: bent(d, 2, by_kl=10), 5, 4),
        ("flatter", lambda d: bent(d, 0.5, by_kl=10), 7, 5.5),
        ("flatter and far off", lambda d: bent(d, 0.4, by_price=1e-3), 8, 7),
        ("never far below the limit", lambda d: lambda mu: d.predicted(mu) + 0.8 * d.limit, 6, 5.5),
        ("noisy", lambda d: noisy(bent(d, 1.2, by_kl=3), 0.05, 0), 6, 4),
    ],
)
def test_few_measurements_suffice(kind, curve, most, mean):
    counts = []
    for seed in range(40):
        delta = Delta(seed)
        probes = delta.search(curve(delta))
        found = best(probes, delta.limit)
        counts.append(len(probes))
        whole = delta.predicted(found.mu) > 0.99 * delta.predicted(0)
        assert found.safety_kl >= AT_LIMIT * delta.limit or whole or len(probes) == MOST_PROBES, (kind, seed)
    assert max(counts) <= most
    assert sum(counts) / len(counts) <= mean
