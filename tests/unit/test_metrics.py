"""Rates and their intervals, against published values of the Wilson score interval."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.evaluation.metrics.rates import Rate, kept_gain


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I: method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_interval(successes, total, low, high):
    rate = Rate(successes, total)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_rate_and_is_symmetric(counts):
    successes, total = counts
    rate, mirrored = Rate(successes, total), Rate(total - successes, total)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low == pytest.approx(1 - mirrored.high, abs=1e-12)


def test_a_rate_of_outcomes():
    assert Rate.of(n > 2 for n in range(4)) == Rate(1, 4)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_what_is_no_rate(successes, total):
    with pytest.raises(ValueError, match=f"{successes} of {total}"):
        Rate(successes, total)


def test_kept_gain():
    assert kept_gain(Rate(2, 10), Rate(10, 10), Rate(8, 10)) == pytest.approx(0.75)
    assert kept_gain(Rate(2, 10), Rate(4, 10), Rate(1, 10)) == pytest.approx(-0.5)


def test_no_gain_to_keep():
    assert kept_gain(Rate(5, 10), Rate(5, 10), Rate(5, 10)) is None
