"""Cohen's kappa against a table worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaguard.evaluation.metrics.agreement import KappaResult, cohen_kappa
from deltaguard.evaluation.metrics.rates import Rate, estimate

REFUSED, COMPLIED, UNDECIDED = "refused", "complied", "undecided"
VERDICTS = st.sampled_from([REFUSED, COMPLIED, UNDECIDED])


def test_a_table_worked_by_hand():
    # 20 and 15 of 50 alike: 0.7 observed. By chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5, so κ = 0.2 / 0.5.
    first = [REFUSED] * 25 + [COMPLIED] * 25
    second = [REFUSED] * 20 + [COMPLIED] * 5 + [REFUSED] * 10 + [COMPLIED] * 15
    result = cohen_kappa(first, second)
    assert result.kappa == pytest.approx(0.4)
    assert (result.agreed, result.total) == (35, 50)


def test_undecided_pairs_are_left_out():
    result = cohen_kappa([REFUSED, UNDECIDED, COMPLIED, REFUSED], [REFUSED, COMPLIED, COMPLIED, UNDECIDED])
    assert result == KappaResult(1.0, 2, 2)


@pytest.mark.parametrize("verdicts", [[], [REFUSED] * 9, [UNDECIDED] * 3])
def test_where_kappa_is_undefined(verdicts):
    assert cohen_kappa(verdicts, verdicts).kappa is None


def test_a_judge_that_always_says_the_same_agrees_by_chance():
    assert cohen_kappa([REFUSED] * 4, [REFUSED, COMPLIED] * 2).kappa == 0


@given(st.lists(st.tuples(VERDICTS, VERDICTS), max_size=30))
def test_laws(pairs):
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    result = cohen_kappa(first, second)
    assert result == cohen_kappa(second, first)
    assert result.agreed <= result.total <= len(pairs)
    assert result.kappa is None or -1 <= result.kappa <= 1
    assert (result.kappa == 1) == (result.kappa is not None and result.agreed == result.total)


def test_judges_need_the_same_answers():
    with pytest.raises(ValueError, match="shorter"):
        cohen_kappa([REFUSED, REFUSED], [REFUSED])


def test_a_rate_in_a_report():
    found = estimate(Rate(15, 148))
    assert (found.low, found.high) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert (found.value, found.total, found.interval) == (15 / 148, 148, "wilson")
