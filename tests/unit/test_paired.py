"""Paired comparisons: exact probabilities by enumeration, intervals by simulation, laws by hypothesis."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from deltaguard.evaluation.metrics.paired import mcnemar, paired_bootstrap

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
PAIRS = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=15)


def _table(both, only_first, only_second, neither):
    rows = [(True, True)] * both + [(True, False)] * only_first
    rows += [(False, True)] * only_second + [(False, False)] * neither
    return [row[0] for row in rows], [row[1] for row in rows]


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (3, 1), (0, 6), (5, 5), (2, 9)])
def test_the_p_value_by_enumeration(only_first, only_second):
    discordant = only_first + only_second
    # Every way in which fair coins could have fallen, and how many are at least as one-sided.
    seen = abs(only_first - only_second)
    falls = [abs(2 * sum(coins) - discordant) >= seen for coins in product((0, 1), repeat=discordant)]
    found = mcnemar(*_table(4, only_first, only_second, 3))
    assert found.p_value == pytest.approx(sum(falls) / len(falls))


@given(st.integers(1, 200), st.integers(0, 200))
@settings(deadline=None)
def test_the_p_value_is_that_of_scipy(only_first, only_second):
    found = mcnemar(*_table(1, only_first, only_second, 0))
    assert found.p_value == pytest.approx(binomtest(only_first, only_first + only_second).pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "correlated"), [(0.1, 0.2, 0.5), (0.5, 0.5, 0.8), (0.02, 0.1, 0)]
)
def test_the_interval_holds_the_true_difference(first, second, correlated):
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(500):
        shared = generator.random(60)
        own = np.where(generator.random(60) < correlated, shared, generator.random(60))
        found = mcnemar(list(shared < first), list(own < second))
        held += found.low <= first - second <= found.high
    assert held / 500 >= 0.93


def test_the_interval_without_correlation_is_that_of_two_wilson_intervals():
    # By hand: 8 of 16 and 4 of 16 without correlation; Wilson gives (0.2800, 0.7200) and (0.1018, 0.4950).
    found = mcnemar(*_table(2, 6, 2, 6))
    assert found.difference == 0.25
    assert found.low == pytest.approx(0.25 - np.hypot(0.5 - 0.2800, 0.4950 - 0.25), abs=2e-4)
    assert found.high == pytest.approx(0.25 + np.hypot(0.7200 - 0.5, 0.25 - 0.1018), abs=2e-4)


def test_two_points_are_told_apart_only_with_enough_prompts():
    assert mcnemar(*_table(10, 2, 0, 88)).finding == "not told apart"
    assert mcnemar(*_table(100, 20, 0, 880)).finding == "higher"
    assert mcnemar(*_table(100, 0, 20, 880)).finding == "lower"


@given(OUTCOMES)
def test_swapping_the_models_turns_the_sign(pairs):
    first, second = zip(*pairs, strict=True)
    one, other = mcnemar(first, second), mcnemar(second, first)
    assert one.difference == -other.difference
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)
    assert one.p_value == other.p_value
    turned = {"higher": "lower", "lower": "higher", "not told apart": "not told apart"}
    assert turned[one.finding] == other.finding
    assert -1 <= one.low <= one.difference <= one.high <= 1


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_model_is_never_told_apart_from_itself(outcomes):
    found = mcnemar(outcomes, outcomes)
    assert (found.difference, found.p_value, found.finding) == (0, 1, "not told apart")


@settings(max_examples=50)
@given(PAIRS)
def test_laws_of_the_paired_bootstrap(pairs):
    first, second = (np.array(column) for column in zip(*pairs, strict=True))
    found, itself = (
        paired_bootstrap(first, second, resamples=60),
        paired_bootstrap(first, first, resamples=60),
    )
    assert found.low <= found.difference <= found.high
    assert found.difference == pytest.approx(np.mean(first - second), abs=1e-9)
    assert 0 < found.p_value <= 1
    assert (itself.difference, itself.p_value, itself.finding) == (0, 1, "not told apart")
    swapped = paired_bootstrap(second, first, resamples=60)
    assert swapped.difference == pytest.approx(-found.difference)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_five_pairs_tell_nothing_apart():
    assert paired_bootstrap([1.0] * 5, [0.0] * 5).finding == "not told apart"
    assert paired_bootstrap([1.0] * 8, [0.0] * 8).finding == "higher"


def test_the_bootstrap_finds_a_small_steady_difference():
    prompts = np.random.default_rng(0).normal(0, 5, 100)
    found = paired_bootstrap(prompts - 0.1, prompts + np.random.default_rng(1).normal(0, 0.2, 100))
    assert found.finding == "lower"


def test_equal_models_are_seldom_told_apart():
    generator = np.random.default_rng(3)
    told = [
        paired_bootstrap(*generator.normal(size=(2, 25)), seed=seed, resamples=300).finding
        != "not told apart"
        for seed in range(200)
    ]
    assert sum(told) / 200 <= 0.1


def test_pairs_must_match():
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, False], [True])
    with pytest.raises(ValueError, match="0 trials"):
        mcnemar([], [])


def test_the_p_value_counts_both_sides():
    """A mean difference of one standard error: twice the share of a normal beyond 1 is 0.32."""
    found = paired_bootstrap([1.0] * 210 + [-1.0] * 190, [0.0] * 400)
    assert 0.27 < found.p_value < 0.38
