"""Answers that were never given: a few are named and left out, and too many end a run."""

from collections.abc import Sequence

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Missed

MAX_MISSING = 0.05
"""The share of missing answers above which a run ends, unless an option says otherwise."""


def refuse_too_many(
    missed: Sequence[Missed], total: int, max_share: float, *, whose: str, option: str
) -> None:
    """End a run in which too much was never answered.

    Args:
        missed: what stands in the place of the answers.
        total: how many there should be.
        max_share: of them that may be missing.
        whose: what is missing and from where, as the beginning of the message.
        option: what raises the share.

    Raises:
        DeltaguardError: more are missing.

    Example:
        >>> refuse_too_many([Missed("status 500")], 10, 0.05, whose="Answers of m", option="--max-missing")
        Traceback (most recent call last):
        deltaguard.errors.DeltaguardError: Answers of m: 1 of 10 are missing, and 5 % may be. ...
    """
    if len(missed) / total > max_share:
        raise DeltaguardError(
            f"{whose}: {len(missed)} of {total} are missing, and {100 * max_share:.3g} % may be. The first "
            f"reason: {missed[0].reason}. What was answered is kept: run the same command again to ask for "
            f"the rest, or allow more ({option})."
        )
