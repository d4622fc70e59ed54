"""Bootstrap intervals: how often they hold the truth, and laws they must obey."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deltaguard.evaluation.metrics.bootstrap import mean_estimate, ratio_of_gains, resampled_means

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_interval_of_a_mean_holds_the_true_mean(draw):
    generator = np.random.default_rng(7)
    true_mean = {"normal": 0.0, "exponential": 1.0}[draw]
    held = 0
    for seed in range(300):
        found = mean_estimate(getattr(generator, draw)(size=30), seed=seed, resamples=400)
        held += found.low <= true_mean <= found.high
    assert 0.89 <= held / 300 <= 0.98


def test_the_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(size=400)
    found = mean_estimate(values)
    expected = 2 * 1.96 * values.std(ddof=1) / 20
    assert found.high - found.low == pytest.approx(expected, rel=0.06)


@settings(max_examples=50)
@given(VALUES)
def test_the_interval_holds_the_mean(values):
    found = mean_estimate(values, resamples=50)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert (found.total, found.interval) == (len(values), "bootstrap")


def test_the_same_seed_gives_the_same_interval():
    values = [1.0, 4.0, 2.0, 9.0]
    assert mean_estimate(values, seed=3) == mean_estimate(values, seed=3)
    assert mean_estimate(values, seed=3).low != mean_estimate(values * 2, seed=3).low


def test_many_examples_are_drawn_in_parts():
    values = np.arange(3000.0)
    assert mean_estimate(values, resamples=800).value == pytest.approx(1499.5)


def test_seeds_are_not_mixed():
    # Within each seed all values are alike, so drawing within seeds leaves the mean where it is.
    found = mean_estimate([[1.0] * 5, [3.0] * 5])
    assert (found.low, found.value, found.high, found.total) == (2.0, 2.0, 2.0, 10)


@pytest.mark.parametrize("values", [[], [[], []], [1.0, float("nan")], [float("inf")]])
def test_what_has_no_mean(values):
    with pytest.raises(ValueError, match="mean"):
        mean_estimate(values)


def test_the_models_must_have_seen_the_same_examples():
    with pytest.raises(ValueError, match="same examples"):
        ratio_of_gains([1.0, 2.0], [1.0], [1.0, 2.0])


def _models(generator, *, kept, noise, size=80):
    """Losses of three models on examples that differ much more than the models do."""
    easy = generator.normal(2.0, 1.0, size)
    gain = generator.normal(0.5, noise, size)
    return easy, easy - gain, easy - kept * gain - generator.normal(0, noise, size) / 4


def test_the_interval_of_a_share_holds_the_true_share():
    generator = np.random.default_rng(11)
    held = 0
    for seed in range(200):
        found = ratio_of_gains(
            *_models(generator, kept=0.7, noise=0.3), better="lower", seed=seed, resamples=300
        )
        assert found is not None
        held += found.low <= 0.7 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_models_are_resampled_together():
    found = ratio_of_gains(*_models(np.random.default_rng(1), kept=0.7, noise=0.05), better="lower")
    # The examples spread by 1, the gains by 0.05: only pairing gives so narrow an interval.
    assert found is not None
    assert found.high - found.low < 0.05


def test_shares_over_several_seeds():
    generator = np.random.default_rng(2)
    runs = [_models(generator, kept=kept, noise=0.1) for kept in (0.5, 0.9)]
    found = ratio_of_gains(*zip(*runs, strict=True), better="lower")
    assert found is not None
    assert found.total == 160
    assert found.value == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(("better", "gained"), [("higher", True), ("lower", False)])
def test_no_gain_in_the_direction_that_counts(better, gained):
    found = ratio_of_gains([0.0] * 8, [1.0] * 8, [0.5] * 8, better=better)
    assert (found is not None) == gained


def test_a_gain_that_may_be_none_has_no_share():
    assert ratio_of_gains([0.0] * 4, [9.0, -8.0, 9.0, -8.0], [0.0] * 4) is None


def _losses(most):
    """Give numbers that differ by more than rounding, of which a gain has no share."""
    return st.integers(-1000, 1000 * most).map(lambda thousandths: thousandths / 1000)


# Of many draws the gain may be none, and there is no share of it.
@settings(max_examples=50, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(st.tuples(*(_losses(most) for most in (1, 3, 3))), min_size=2, max_size=10))
def test_both_directions_agree(rows):
    aligned, finetuned, restored = (np.array(column) for column in zip(*rows, strict=True))
    found = ratio_of_gains(aligned, finetuned, restored, resamples=60)
    assume(found is not None)
    turned = ratio_of_gains(-aligned, -finetuned, -restored, better="lower", resamples=60)
    assert turned == found
    assert found.low <= found.value <= found.high
    assert np.isfinite([found.low, found.high]).all()


def test_small_samples_spread_as_their_means_do():
    """The standard error of the mean of 0 and 2 is 1; of all four of two such groups it is 1 / √2."""
    pair = np.array([[0.0], [2.0]])
    for groups, expected in (([pair], 1.0), ([pair, pair], 2**-0.5)):
        found = resampled_means(groups, seed=0, resamples=20_000)
        assert found.std() == pytest.approx(expected, rel=0.03)
