"""Fewer cases than all of two lists of values make."""

from collections.abc import Sequence
from typing import TypeVar

OneT = TypeVar("OneT")
OtherT = TypeVar("OtherT")


def in_turn(ones: Sequence[OneT], others: Sequence[OtherT]) -> list[tuple[OneT, OtherT]]:
    """The first value with all others, and each of the rest with one of them in turn."""
    return [
        (one, other)
        for i, one in enumerate(ones)
        for j, other in enumerate(others)
        if i == 0 or j == i % len(others)
    ]
