"""Means, and shares of a gain, with bootstrap intervals.

Every interval holds 95 %. Whoever asks twice with the same seed gets the same numbers.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from deltaguard.reports.records.evaluation import Better, Estimate

Array = NDArray[np.float64]
Values = Sequence[float] | Sequence[Sequence[float]]
"""One value an example; or one such sequence a seed, whose examples are resampled among themselves."""

RESAMPLES = 2000
_TAIL = 0.025
# So many examples are drawn at a time: 8 MiB of indices, whatever the number of examples.
_DRAWS = 1 << 20


def mean_estimate(values: Values, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Take a mean over examples with its percentile bootstrap interval.

    Limits. Examples that are all alike give an interval without width, and so does a single one: the interval
    of a share of yes and no is `rates.Rate`.

    Args:
        values: one number an example, or groups of them (see `Values`); each example counts once.
        seed: of the resampling.
        resamples: how often the examples are drawn anew.

    Returns:
        The mean, and an interval that holds it.

    Raises:
        ValueError: there is no value, or one is not finite.

    Example:
        >>> mean_estimate([1.0, 2.0, 3.0]).value
        2.0
    """
    groups = columns(values)
    value = float(means(groups)[0])
    low, high = interval(value, resampled_means(groups, seed=seed, resamples=resamples)[:, 0])
    # The correction for small samples may leave the range of the values, a bootstrap mean never does.
    every = np.concatenate(groups)
    low, high = max(low, min(value, float(every.min()))), min(high, max(value, float(every.max())))
    return Estimate(value=value, low=low, high=high, total=count(groups), interval="bootstrap")


def ratio_of_gains(
    aligned: Values,
    finetuned: Values,
    restored: Values,
    *,
    better: Better = "higher",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """Measure the share of the fine-tuning's gain that the restored model keeps, on the same examples.

    (mean restored - mean aligned) / (mean finetuned - mean aligned). The three models are resampled together,
    so that what makes an example easy or hard for all of them cancels out.

    Args:
        aligned: the aligned model's values, one an example, or groups of them (see `Values`).
        finetuned: the fine-tuned model's values on the same examples.
        restored: the restored model's.
        better: which way is better: "lower" for a loss.
        seed: of the resampling.
        resamples: how often the examples are drawn anew.

    Returns:
        The share with its percentile interval; above 1 where the restored model does better than the
        fine-tuned one. `None` where the fine-tuning gained nothing, or so little that more than 2.5 % of the
        resamples show no gain: a share of that has no bounded interval.

    Raises:
        ValueError: there is no value, one is not finite, or the three differ in their number of values.

    Example:
        >>> ratio_of_gains([2.0, 3.0], [1.0, 2.0], [1.5, 2.5], better="lower").value
        0.5
    """
    groups = columns(aligned, finetuned, restored)
    sign = 1.0 if better == "higher" else -1.0
    gain, kept = _gains(means(groups)[None], sign)
    if gain[0] <= 0:
        return None
    gains, kepts = _gains(resampled_means(groups, seed=seed, resamples=resamples), sign)
    lost = gains <= 0
    if lost.mean() > _TAIL:
        return None
    # A resample without a gain bounds nothing: it lies beyond whichever end its numerator points to.
    shares = np.where(lost, np.copysign(np.inf, kepts), kepts / np.where(lost, 1.0, gains))
    value = float(kept[0] / gain[0])
    return Estimate(
        value=value,
        low=min(value, _quantile(shares, _TAIL, "higher")),
        high=max(value, _quantile(shares, 1 - _TAIL, "lower")),
        total=count(groups),
        interval="bootstrap",
    )


def interval(value: float, resampled: Array) -> tuple[float, float]:
    """Find both ends of the percentile interval of a number; they hold the number itself."""
    low, high = _quantile(resampled, _TAIL, "linear"), _quantile(resampled, 1 - _TAIL, "linear")
    return min(low, value), max(high, value)


def means(groups: Sequence[Array]) -> Array:
    """Take the mean of each column over all examples of all groups."""
    total: Array = np.concatenate(list(groups)).mean(axis=0)
    return total


def resampled_means(groups: Sequence[Array], *, seed: int, resamples: int) -> Array:
    """Take means over examples drawn with replacement within each group.

    They spread too little about the mean by the factor √((n-1)/n), which is made good (Hesterberg 2015, The
    American Statistician 69, "What Teachers Should Know About the Bootstrap", on narrowness bias).

    Args:
        groups: arrays (examples, columns); the columns of an example are drawn together.
        seed: of the draws.
        resamples: how many means.

    Returns:
        Array (resamples, columns).
    """
    generator = np.random.default_rng(seed)
    sums: Array = np.zeros((resamples, groups[0].shape[1]))
    for group in groups:
        step = max(1, _DRAWS // len(group))
        for start in range(0, resamples, step):
            drawn = min(step, resamples - start)
            picks = generator.integers(len(group), size=(drawn, len(group)))
            sums[start : start + drawn] += group[picks].sum(axis=1)
    examples, centre = count(groups), means(groups)
    return centre + (sums / examples - centre) * sqrt(examples / max(examples - len(groups), 1))


def count(groups: Sequence[Array]) -> int:
    """Count the examples of all groups."""
    return sum(len(group) for group in groups)


def columns(*series: Values) -> list[Array]:
    """Stack series into groups of arrays (examples, series), after checking that the series fit together.

    Raises:
        ValueError: there is no value, one is not finite, or the series differ in their number of values.
    """
    grouped = [_groups(values) for values in series]
    shapes = [[len(group) for group in groups] for groups in grouped]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"Values of the same examples are needed, and there are {shapes} of them.")
    stacked = [np.stack(group, axis=1) for group in zip(*grouped, strict=True)]
    if not stacked or not all(len(group) for group in stacked):
        raise ValueError("There is no mean of no values.")
    if not all(np.isfinite(group).all() for group in stacked):
        raise ValueError("A value is not finite, so there is no mean.")
    return stacked


def _groups(values: Values) -> list[Array]:
    if len(values) and np.ndim(values[0]):
        return [np.asarray(group, dtype=np.float64) for group in cast("Sequence[Sequence[float]]", values)]
    return [np.asarray(values, dtype=np.float64)]


def _gains(of: Array, sign: float) -> tuple[Array, Array]:
    """Say what the fine-tuned and the restored model gained, better is positive; `of` is (resamples, 3)."""
    return sign * (of[:, 1] - of[:, 0]), sign * (of[:, 2] - of[:, 0])


def _quantile(values: Array, share: float, method: Literal["linear", "lower", "higher"]) -> float:
    return float(np.quantile(values, share, method=method))
