"""Comparisons over several runs: against likelihoods maximised by hand, by simulation, and by laws."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaguard.evaluation.metrics.paired import mcnemar
from deltaguard.evaluation.metrics.runs import difference_of_shares, equality, gain_kept, gain_lead

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)
Z = 1.959964


def outcomes(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def likeliest(only_first, only_second, pairs, difference):
    """The share of prompts that only the second says yes to, by trying out all."""
    rest = pairs - only_first - only_second
    shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, 20_001)[1:-1]
    found = only_second * np.log(shares) + only_first * np.log(shares + difference)
    return shares[np.argmax(found + rest * np.log(1 - 2 * shares - difference))]


@pytest.mark.parametrize(("only_first", "only_second"), [(4, 0), (12, 2), (1, 3), (9, 9)])
def test_each_end_is_newcombes_or_that_of_the_score_test_whichever_is_further_out(only_first, only_second):
    first, second = outcomes(6, only_first, only_second, 30)
    pairs = len(first)
    found, newcombe = difference_of_shares([first], [second]), mcnemar(first, second)
    assert found.low <= newcombe.low
    assert found.high >= newcombe.high
    for end, other in ((found.low, newcombe.low), (found.high, newcombe.high)):
        share = likeliest(only_first, only_second, pairs, end)
        variance = pairs * (2 * share + end * (1 - end))
        distance = abs(only_first - only_second - pairs * end) / sqrt(variance)
        assert distance == pytest.approx(Z, abs=2e-3) or (end == other and distance > Z)


def test_without_any_difference_the_end_is_that_of_a_share_of_no_prompt():
    # The score test of 0 in n alone: n d² = 1.96² d (1 - d).
    found = difference_of_shares([[True] * 40 + [False] * 160], [[True] * 40 + [False] * 160])
    assert found.high == pytest.approx(Z**2 / (200 + Z**2), abs=1e-6) == -found.low


@given(OUTCOMES, st.integers(1, 5))
def test_runs_that_are_alike_say_as_much_as_one(pairs, runs):
    first, second = zip(*pairs, strict=True)
    one, many = difference_of_shares([first], [second]), difference_of_shares([first] * runs, [second] * runs)
    assert (many.value, many.low, many.high) == pytest.approx((one.value, one.low, one.high))
    assert many.low < many.value < many.high or abs(many.value) == 1


@given(OUTCOMES)
def test_swapping_the_models_turns_the_sign(pairs):
    first, second = zip(*pairs, strict=True)
    one, other = difference_of_shares([first], [second]), difference_of_shares([second], [first])
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
    assert one.low <= one.value <= one.high


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=8, max_size=8), min_size=1, max_size=3))
def test_the_p_value_by_throwing_all_coins(runs):
    means = np.mean(runs, axis=0)
    seen = abs(means.sum())
    falls = [abs(np.dot(signs, means)) >= seen - 1e-9 for signs in product((-1, 1), repeat=8)]
    zeros = [[0] * 8] * len(runs)
    assert equality(runs, zeros) == pytest.approx(np.mean(falls), abs=0.02)


@given(OUTCOMES)
def test_for_one_run_of_yes_and_no_the_p_value_is_mcnemars(pairs):
    first, second = zip(*pairs, strict=True)
    assert equality([first], [second]) == mcnemar(first, second).p_value
    assert equality([first] * 2, [second] * 2) == pytest.approx(equality([first], [second]), abs=0.02)


def test_models_that_are_alike_on_every_prompt_are_equal():
    assert equality([[0.5, 1.5]] * 3, [[0.5, 1.5]] * 3) == 1.0


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="no runs"):
        difference_of_shares([], [])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        difference_of_shares([[True]], [])
    with pytest.raises(ValueError, match="one sequence a run"):
        equality([[]], [[]])


@pytest.mark.parametrize("kept", [0.0, 0.6, 1.0])
def test_the_interval_of_a_share_of_right_answers_holds_the_true_share(kept):
    generator = np.random.default_rng(4)
    held, runs = 0, 150
    for _ in range(runs):
        # The fine-tuned model knows 70 % of the answers, the restored one those that it kept.
        finetuned = generator.random(50) < 0.7
        restored = finetuned & (generator.random(50) < kept)
        found = gain_kept([[0.0] * 50], [1.0 * finetuned], [1.0 * restored], better="higher")
        assert found.low < found.value < found.high
        held += found.low <= kept <= found.high
    assert held / runs >= 0.93


def test_how_far_one_leads_is_the_difference_of_both_shares():
    generator = np.random.default_rng(8)
    aligned, finetuned, first, second = (
        [generator.normal(centre, 0.3, 30) for _ in range(2)] for centre in (3.0, 1.0, 1.5, 2.0)
    )
    lead = gain_lead(aligned, finetuned, first, second, better="lower")
    shares = [gain_kept(aligned, finetuned, each, better="lower").value for each in (first, second)]
    assert lead.value == pytest.approx(shares[0] - shares[1])
    assert lead.total == 30
    assert gain_lead(finetuned, aligned, first, second, better="lower") is None


def test_the_interval_of_a_whole_gain_is_that_of_no_difference_from_the_fine_tuned_model():
    finetuned = [1.0] * 35 + [0.0] * 15
    found = gain_kept([[0.0] * 50], [finetuned], [finetuned], better="higher")
    assert found.value == 1
    same = difference_of_shares([[True] * 35 + [False] * 15], [[True] * 35 + [False] * 15])
    assert found.high - found.low == pytest.approx((same.high - same.low) / 0.7, rel=0.05)
