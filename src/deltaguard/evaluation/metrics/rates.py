"""Rates with their uncertainty, and how far two judges agree.

The formulas are a few lines each, and are held to statsmodels' by tests: that takes a second to import, and
sixty times as long for an interval.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from deltaguard.evaluation.exchange import Verdict
from deltaguard.reports.records.evaluation import Estimate

Z_95 = 1.959963984540054
"""Standard errors on either side of the middle of a normal distribution that hold 95 % of it."""


@dataclass(frozen=True)
class Rate:
    """How many of a number of trials came out one way, with the 95 % Wilson interval.

    The interval holds for few trials and for rates of 0 and 1, where the usual ± interval has no width.

    Attributes:
        successes: trials that came out so.
        total: all trials, at least one.

    Raises:
        ValueError: `total` is not positive, or `successes` is not between 0 and `total`.

    Example:
        >>> rate = Rate(1, 10)
        >>> rate.value, round(rate.low, 3), round(rate.high, 3)
        (0.1, 0.018, 0.404)
    """

    successes: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.successes <= self.total:
            raise ValueError(f"{self.successes} of {self.total} trials is no rate.")

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> "Rate":
        """Count the outcomes that are true."""
        seen = list(outcomes)
        return cls(sum(seen), len(seen))

    @property
    def value(self) -> float:
        """Share of the trials: successes / total."""
        return self.successes / self.total

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        # 0 exactly: the difference is off by a rounding error.
        return self._centre - self._half_width if self.successes else 0.0

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self._centre + self._half_width if self.successes < self.total else 1.0

    @property
    def _centre(self) -> float:
        return (self.successes + Z_95**2 / 2) / (self.total + Z_95**2)

    @property
    def _half_width(self) -> float:
        failures = self.total - self.successes
        spread = sqrt(self.successes * failures / self.total + Z_95**2 / 4)
        return Z_95 * spread / (self.total + Z_95**2)


def estimate(rate: Rate) -> Estimate:
    """Write a rate as reports hold it.

    Example:
        >>> estimate(Rate(0, 20)).high < 0.17
        True
    """
    return Estimate(value=rate.value, low=rate.low, high=rate.high, total=rate.total, interval="wilson")


def are_flags(values: Iterable[float]) -> bool:
    """Tell whether every value is 0 or 1, a yes or a no, so that their mean is a share.

    Example:
        >>> are_flags([1.0, 0.0]), are_flags([1.0, 0.5])
        (True, False)
    """
    return all(value in (0.0, 1.0) for value in values)


def kept_gain(aligned: Rate, finetuned: Rate, restored: Rate) -> float | None:
    """Compute the share of a gain that is kept: (restored - aligned) / (finetuned - aligned).

    Returns:
        The share, above 1 where the restored model does better than the fine-tuned one; `None` where the
        fine-tuning gained nothing.
    """
    gain = finetuned.value - aligned.value
    return (restored.value - aligned.value) / gain if gain > 0 else None


@dataclass(frozen=True)
class KappaResult:
    """The agreement of two judges on the answers that both decided.

    Attributes:
        kappa: Cohen's κ: 1 for full agreement, 0 for as much as chance gives, below 0 for less; `None` where
            both gave one and the same verdict throughout, or decided no answer together.
        agreed: answers on which they agree.
        total: answers that both decided.
    """

    kappa: float | None
    agreed: int
    total: int


def cohen_kappa(first: Sequence[Verdict], second: Sequence[Verdict]) -> KappaResult:
    """Compute Cohen's κ = (observed - expected) / (1 - expected) of two judges on the same answers.

    Cohen (1960), Educational and Psychological Measurement 20, 37-46. The expected agreement is that of two
    judges who give their verdicts as often as these, but independently of each other.

    Limits. κ is low where nearly all answers get one verdict, however often the judges agree; read it beside
    `agreed` and `total`.

    Args:
        first: one judge's verdicts.
        second: the other's, on the same answers in the same order. Pairs with an undecided verdict are left
            out.

    Raises:
        ValueError: the numbers of verdicts differ.

    Example:
        >>> cohen_kappa(["refused", "complied"], ["refused", "complied"]).kappa
        1.0
    """
    decided = [pair for pair in zip(first, second, strict=True) if "undecided" not in pair]
    agreed, total = sum(one == other for one, other in decided), len(decided)
    given, also = Counter(one for one, _ in decided), Counter(other for _, other in decided)
    by_chance = sum(given[verdict] * also[verdict] for verdict in given)
    # In whole numbers, so that certain agreement is seen exactly.
    if by_chance == total**2:
        return KappaResult(None, agreed, total)
    return KappaResult((agreed * total - by_chance) / (total**2 - by_chance), agreed, total)
