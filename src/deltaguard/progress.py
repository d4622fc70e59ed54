"""How long-running work says how far it is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """How far a stage of some work is.

    Attributes:
        stage: what is being done, such as "respond" or "restore".
        done: how many items are done.
        total: out of how many.
    """

    stage: str
    done: int
    total: int


Progress = Callable[[Event], None]


def ignore(_: Event) -> None:
    """Report to nobody."""
