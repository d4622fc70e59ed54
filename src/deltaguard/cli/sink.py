"""Where output goes: results to stdout, everything else to stderr."""

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter
from pydantic import BaseModel, ValidationError
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from deltaguard.progress import Event, Progress

OptionsT = TypeVar("OptionsT", bound=BaseModel)

Json = Annotated[
    bool, Parameter(name="--json", negative="", help="Print one JSON document and nothing else on stdout.")
]


class UsageError(Exception):
    """Options that do not go together or are out of range: exit code 2."""


def checked(options: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Options validated, every problem in one message.

    Raises:
        UsageError: a value is wrong or a name unknown.
    """
    try:
        return options.model_validate(values)
    except ValidationError as error:
        problems = [
            (".".join(map(str, problem["loc"])) or "options", problem["msg"].removeprefix("Value error, "))
            for problem in error.errors()
        ]
        raise UsageError("\n".join(f"{where}: {what}" for where, what in problems)) from error


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
        # Names of files and models are not markup.
        Console(markup=False).print(drawing, soft_wrap=isinstance(drawing, str))


def tell(text: str) -> None:
    """A line for people, on stderr."""
    Console(stderr=True, highlight=False).print(text, markup=False)


def complain(message: str, *, hint: str | None = None) -> None:
    """One error message, on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]Error:[/]", end=" ")
    console.print(message, markup=False)
    if hint:
        console.print(hint, markup=False)


class ProgressBar:
    """Progress of several stages, each one bar."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Show how far a stage is."""
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total)
        self._bars.update(self._tasks[event.stage], completed=event.done, total=event.total)


class ProgressLines:
    """Progress where there is no terminal: one line when a stage begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Say that a stage began."""
        if event.stage != self._stage:
            self._stage = event.stage
            tell(f"{event.stage} ...")


def hide_bars_of_transformers() -> None:
    """Switch off its bars for loading and saving: they would be drawn over those of `progress_bar`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
def progress_bar() -> Generator[Progress]:
    """Whom long-running work tells how far it is: bars on stderr that vanish at the end, or lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        yield ProgressBar(bars)
