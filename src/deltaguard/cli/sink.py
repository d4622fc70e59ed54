"""Where output goes: results to stdout, everything else to stderr."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

from cyclopts import Parameter
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from deltaguard.progress import Event

Json = Annotated[
    bool, Parameter(name="--json", negative="", help="Print one JSON document and nothing else on stdout.")
]


def emit(result: BaseModel, drawing: RenderableType, *, as_json: bool) -> None:
    """Print a result: as JSON for programs, or drawn for people.

    Args:
        result: what a verb found or did.
        drawing: the same for people.
        as_json: which of the two goes to stdout.
    """
    if as_json:
        sys.stdout.write(result.model_dump_json(indent=2) + "\n")
    else:
        Console().print(drawing, soft_wrap=isinstance(drawing, str))


def tell(text: str) -> None:
    """A line for people, on stderr."""
    Console(stderr=True, highlight=False).print(text)


def complain(message: str, *, hint: str | None = None) -> None:
    """One error message, on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]Error:[/]", end=" ")
    console.print(message, markup=False)
    if hint:
        console.print(hint, markup=False)


class ProgressBar:
    """Progress of several stages, each one bar on stderr."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Show how far a stage is."""
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total)
        self._bars.update(self._tasks[event.stage], completed=event.done, total=event.total)


@contextmanager
def progress_bar() -> Generator[ProgressBar]:
    """Bars that vanish when the block ends; silent where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield ProgressBar(bars)
