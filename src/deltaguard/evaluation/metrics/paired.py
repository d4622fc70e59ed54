"""Two models on the same prompts: how far they differ, and whether the prompts can tell.

A comparison calls one model higher or lower only where the 95 % interval of the difference excludes 0 and the
test rejects equality at 5 %; otherwise the two are not told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Literal

import numpy as np

from deltaguard.evaluation.metrics.bootstrap import (
    RESAMPLES,
    Values,
    columns,
    count,
    interval,
    means,
    resampled_means,
)
from deltaguard.evaluation.metrics.rates import Rate
from deltaguard.reports.records.evaluation import Finding

_LEVEL = 0.05


@dataclass(frozen=True)
class PairedTest:
    """What a paired comparison found.

    Attributes:
        difference: mean of (first - second) over the pairs.
        low: lower end of its 95 % interval.
        high: upper end.
        p_value: of the hypothesis that there is no difference, two-sided.
        total: how many pairs.
        test: how it was computed.

    Example:
        >>> mcnemar([True] * 20, [False] * 20).finding
        'higher'
    """

    difference: float
    low: float
    high: float
    p_value: float
    total: int
    test: Literal["mcnemar", "paired bootstrap"]

    @property
    def finding(self) -> Finding:
        """Which way the first differs from the second."""
        if self.low <= 0 <= self.high or self.p_value >= _LEVEL:
            return "not told apart"
        return "higher" if self.difference > 0 else "lower"


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Compare two shares of yes and no over the same prompts.

    The p-value is McNemar's in its exact form: given the number of prompts on which the two differ, the
    number of those that only the first says yes to is binomial with probability 1/2. The interval of the
    difference of shares is method 10 of Newcombe (1998), Statistics in Medicine 17, 2635-2650: Wilson's
    intervals of the two shares, joined with the correlation of the pairs. It has width for few pairs and for
    shares of 0 and 1.

    Args:
        first: the first model's outcomes, one a prompt.
        second: the second model's on the same prompts.

    Raises:
        ValueError: there is no pair, or the numbers of outcomes differ.

    Example:
        >>> test = mcnemar([True, True, False], [True, False, False])
        >>> round(test.difference, 3), test.p_value, test.finding
        (0.333, 1.0, 'not told apart')
    """
    pairs = [(bool(one), bool(other)) for one, other in zip(first, second, strict=True)]
    both, only_first = pairs.count((True, True)), pairs.count((True, False))
    only_second, neither = pairs.count((False, True)), pairs.count((False, False))
    one, other = Rate(both + only_first, len(pairs)), Rate(both + only_second, len(pairs))
    difference = one.value - other.value
    phi = _correlation(both, only_first, only_second, neither)
    tosses = only_first + only_second
    tail = sum(comb(tosses, k) for k in range(min(only_first, only_second) + 1))
    return PairedTest(
        difference=(only_first - only_second) / len(pairs),
        low=max(-1.0, difference - _joined(one.value - one.low, other.high - other.value, phi)),
        high=min(1.0, difference + _joined(one.high - one.value, other.value - other.low, phi)),
        p_value=min(1.0, 2 * tail / 2**tosses),
        total=len(pairs),
        test="mcnemar",
    )


def paired_bootstrap(
    first: Values, second: Values, *, seed: int = 0, resamples: int = RESAMPLES
) -> PairedTest:
    """Compare two means over the same prompts by resampling the prompts.

    The p-value is twice the share of resamples whose mean difference lies on the other side of 0. It is never
    below 2^(1-n), the least that n pairs can give in a test that flips signs: fewer than six pairs tell
    nothing apart.

    Args:
        first: the first model's values, one a prompt, or groups of them (see `bootstrap.Values`).
        second: the second model's on the same prompts.
        seed: of the resampling.
        resamples: how often the prompts are drawn anew.

    Raises:
        ValueError: there is no pair, a value is not finite, or the numbers of values differ.

    Example:
        >>> paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).finding
        'not told apart'
    """
    groups = [group[:, :1] - group[:, 1:] for group in columns(first, second)]
    difference = float(means(groups)[0])
    drawn = resampled_means(groups, seed=seed, resamples=resamples)[:, 0]
    low, high = interval(difference, drawn)
    beyond = min(int(np.count_nonzero(drawn <= 0)), int(np.count_nonzero(drawn >= 0)))
    least = 2.0 ** (1 - count(groups))
    return PairedTest(
        difference=difference,
        low=low,
        high=high,
        # One is added to both counts: the sample itself is one of the resamples.
        p_value=min(1.0, max(least, 2 * (beyond + 1) / (resamples + 1))),
        total=count(groups),
        test="paired bootstrap",
    )


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's φ of a two by two table; a positive one is made smaller by his continuity correction."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    covered = both * neither - only_first * only_second
    half = (both + only_first + only_second + neither) / 2
    return (max(covered - half, 0.0) if covered > 0 else covered) / sqrt(margins)


def _joined(one: float, other: float, correlation: float) -> float:
    # max: the difference under the root is off by a rounding error where it vanishes.
    return sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))
