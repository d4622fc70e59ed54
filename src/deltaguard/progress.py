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
        detail: what else there is to say of the last one, such as what was measured.
    """

    stage: str
    done: int
    total: int
    detail: str = ""


Progress = Callable[[Event], None]


def ignore(_: Event) -> None:
    """Report to nobody."""
