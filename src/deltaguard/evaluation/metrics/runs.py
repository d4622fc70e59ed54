"""Two models compared over several runs, such as the seeds of a fine-tune, on the same prompts in every run.

Runs share their prompts, so more runs are not more prompts: five runs that come out alike say as much about
other prompts as one of them. What is found holds for these runs.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean

import numpy as np

from deltaguard.evaluation.metrics.bootstrap import ratio_of_gains
from deltaguard.evaluation.metrics.paired import mcnemar
from deltaguard.evaluation.metrics.rates import Z_95, are_flags
from deltaguard.reports.records.evaluation import Better, Estimate

Flags = Sequence[bool]
Runs = Sequence[Sequence[float]]
"""One sequence a run, in it one value a prompt."""

FLIPS = 19_999
_HALVINGS = 40


def difference_of_shares(first: Sequence[Flags], second: Sequence[Flags]) -> Estimate:
    """Measure how far two shares of yes and no differ, each the mean of several runs over the same prompts.

    In each run the interval is Newcombe's for paired shares (see `mcnemar`), and each of its ends that of the
    score interval of Tango (1998, Statistics in Medicine 17, 891-908) where that lies further out. Each of
    the two is too short where the other is not. Of 200 prompts where one model says yes to all that the other
    does and to 2 % more, up to 8 % of samples have Newcombe's upper end below those 2 points, and 5 % Tango's
    lower end above them, where 2.5 % are meant.

    The ends of several runs are averaged. These are the limits of a sum from the limits of its parts (Zou &
    Donner 2008, Statistics in Medicine 27, 1693-1702) for runs whose errors are fully correlated, the most
    that runs on the same prompts can be: however far they really agree, the mean varies no more than that.
    So runs that are all alike give the interval of one, and no number of runs gives one without width.

    Args:
        first: the first model's outcomes: one sequence a run, in it one a prompt.
        second: the second model's, likewise.

    Raises:
        ValueError: there is no run or no prompt, or the numbers of runs or of outcomes differ.

    Example:
        >>> one = difference_of_shares([[True] * 3 + [False] * 17], [[False] * 20])
        >>> five = difference_of_shares([[True] * 3 + [False] * 17] * 5, [[False] * 20] * 5)
        >>> round(one.value, 2), round(one.low, 3) == round(five.low, 3)
        (0.15, True)
    """
    runs: list[tuple[float, float, float]] = []
    for one, other in zip(first, second, strict=True):
        newcombe, pairs = mcnemar(one, other), len(one)
        only_first = sum(mine and not theirs for mine, theirs in zip(one, other, strict=True))
        only_second = sum(theirs and not mine for mine, theirs in zip(one, other, strict=True))
        low = min(newcombe.low, -_tango_upper(only_second, only_first, pairs))
        high = max(newcombe.high, _tango_upper(only_first, only_second, pairs))
        runs.append((newcombe.difference, low, high))
    if not runs:
        raise ValueError("There is no difference of no runs.")
    value, low, high = (fmean(ends) for ends in zip(*runs, strict=True))
    return Estimate(value=value, low=low, high=high, total=len(first[0]), interval="newcombe")


def gain_kept(aligned: Runs, finetuned: Runs, restored: Runs, *, better: Better) -> Estimate | None:
    """Measure the share of the fine-tuning's gain that the restored model keeps.

    Every prompt counts with its mean over the runs.

    The interval is that of `ratio_of_gains`. Of right and wrong answers that all come out alike, resampling
    makes one without width. So theirs is never narrower than that of the difference of shares from the
    nearer of the aligned model (0) and the fine-tuned one (1), divided by the gain that was seen.

    Args:
        aligned: the aligned model's values.
        finetuned: the fine-tuned model's.
        restored: the restored model's.
        better: which way is better.

    Returns:
        As `ratio_of_gains`.

    Raises:
        ValueError: as `ratio_of_gains`, or the numbers of runs differ.

    Example:
        >>> found = gain_kept([[0.0] * 9], [[1.0] * 9], [[0.0] * 9], better="higher")
        >>> found.value, found.low < 0 < found.high
        (0.0, True)
    """
    return _lead(aligned, finetuned, restored, {0.0: aligned, 1.0: finetuned}, better)


def gain_lead(
    aligned: Runs, finetuned: Runs, first: Runs, second: Runs, *, better: Better
) -> Estimate | None:
    """Measure how much more of the fine-tuning's gain one restored model keeps than another.

    Args:
        aligned: the aligned model's values.
        finetuned: the fine-tuned model's.
        first: those of one restored model.
        second: those of the other.
        better: which way is better.

    Returns:
        As `gain_kept`; with right and wrong answers never narrower than the interval of the difference of the
        two shares, divided by the gain that was seen.

    Raises:
        ValueError: as `gain_kept`.
    """
    return _lead(aligned, finetuned, first, {0.0: second}, better)


def over_runs(values: Runs) -> list[float]:
    """Average each prompt over the runs, which all have the same prompts."""
    return [fmean(of_prompt) for of_prompt in zip(*values, strict=True)]


def equality(first: Runs, second: Runs, *, seed: int = 0) -> float:
    """Compute the two-sided p-value of the hypothesis that two models do equally well on the same prompts.

    Every prompt counts once, with its mean difference over the runs. If the two models could be exchanged,
    the sign of each would be a fair coin's, whatever the runs have in common (Fisher 1935, The Design of
    Experiments, section 21). For one run of yes and no that is McNemar's exact test, which is computed;
    otherwise coins are thrown.

    Args:
        first: the first model's values.
        second: the second model's.
        seed: of the coins.

    Raises:
        ValueError: the numbers of runs or of values differ, or there is none.

    Example:
        >>> equality([[True] * 9], [[False] * 9]), equality([[0.5] * 4], [[0.5] * 4])
        (0.00390625, 1.0)
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if differences.ndim != 2 or not differences.size:
        raise ValueError("Values of the same prompts are needed, one sequence a run.")
    if len(first) == 1 and are_flags((*first[0], *second[0])):
        return mcnemar([bool(v) for v in first[0]], [bool(v) for v in second[0]]).p_value
    means = differences.mean(axis=0)
    coins = np.random.default_rng(seed).integers(2, size=(FLIPS, len(means)), dtype=np.int8)
    sums = np.abs((2.0 * coins - 1) @ means)
    # Sums that are equal but for rounding are as extreme as what was seen.
    extreme = int(np.count_nonzero(sums >= abs(means.sum()) - 1e-9 * np.abs(means).sum()))
    return (extreme + 1) / (FLIPS + 1)


def _lead(
    aligned: Runs, finetuned: Runs, restored: Runs, others: Mapping[float, Runs], better: Better
) -> Estimate | None:
    """Measure the share of the gain by which a model leads `others[0.0]`; the keys are the others' own leads.

    Its interval is never narrower than that of the distance from the nearest of the others.
    """
    start, end, one, other = map(over_runs, (aligned, finetuned, restored, others[0.0]))
    # Nothing is added where the other is the aligned model itself.
    moved = [value + (base - against) for value, base, against in zip(one, start, other, strict=True)]
    share = ratio_of_gains(start, end, moved, better=better)
    compared = (restored, *others.values())
    if share is None or not all(are_flags(run) for runs in compared for run in runs):
        return share
    gain = fmean(end) - fmean(start)
    place = min(others, key=lambda known: abs(share.value - known))
    models = ([[value == 1 for value in run] for run in runs] for runs in (restored, others[place]))
    difference = difference_of_shares(*models)
    low, high = sorted((place + difference.low / gain, place + difference.high / gain))
    return share.model_copy(update={"low": min(share.low, low), "high": max(share.high, high)})


def _tango_upper(only_first: int, only_second: int, pairs: int) -> float:
    """Find the largest difference that the score test does not reject; the statistic falls as it grows."""
    low, high = (only_first - only_second) / pairs, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _score(only_first, only_second, pairs, middle) > -Z_95:
            low = middle
        else:
            high = middle
    return high


def _score(only_first: int, only_second: int, pairs: int, difference: float) -> float:
    """Tango's statistic: how far the pairs are from a difference, in its standard errors."""
    a = 2 * pairs
    b = (2 * pairs - only_first + only_second) * difference - only_first - only_second
    c = -only_second * difference * (1 - difference)
    # The likeliest share of prompts that only the second says yes to, were that the difference.
    share = (sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = pairs * (2 * share + difference * (1 - difference))
    found = only_first - only_second - pairs * difference
    # It vanishes for a difference of -1 alone, from which such pairs do not differ.
    return found / sqrt(variance) if variance > 0 else 0.0
