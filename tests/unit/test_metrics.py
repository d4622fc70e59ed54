"""Rates, their intervals and agreement, against published values and against statsmodels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from deltaguard.evaluation.metrics.rates import Rate, cohen_kappa, kept_gain

VERDICTS = ("refused", "complied", "undecided")


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
def test_the_interval_is_that_of_statsmodels(counts):
    rate = Rate(*counts)
    assert (rate.low, rate.high) == pytest.approx(proportion_confint(*counts, method="wilson"), abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS)), max_size=40))
def test_kappa_is_that_of_statsmodels(pairs):
    found = cohen_kappa([one for one, _ in pairs], [other for _, other in pairs])
    decided = [pair for pair in pairs if "undecided" not in pair]
    table = [[decided.count((one, other)) for other in VERDICTS[:2]] for one in VERDICTS[:2]]
    assert (found.agreed, found.total) == (table[0][0] + table[1][1], len(decided))
    if found.kappa is None:
        assert not decided or len({verdict for pair in decided for verdict in pair}) == 1
    else:
        assert found.kappa == pytest.approx(cohens_kappa(table, return_results=False), abs=1e-12)


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
