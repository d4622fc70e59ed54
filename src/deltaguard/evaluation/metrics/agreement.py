"""How far two judges agree beyond chance."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deltaguard.evaluation.exchange import Verdict


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
    """Cohen's κ = (observed - expected) / (1 - expected) of two judges' verdicts on the same answers.

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
