"""The one printer: results to stdout, everything else to stderr, and nothing that a terminal would obey."""

import json
import os
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from cyclopts import Parameter, Token, validators
from pydantic import BaseModel, ValidationError
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.text import Text

from deltaguard.errors import listed
from deltaguard.files import expanded, problems
from deltaguard.progress import Event, Progress
from deltaguard.text import printable, printable_lines

OptionsT = TypeVar("OptionsT", bound=BaseModel)

Reference = str | Path
"""A model or store, by Hub id or folder. It comes as text; the second type has shells complete folders."""


def _as_user_path(_: Any, tokens: Sequence[Token]) -> Path:
    if not tokens[0].value:
        # Of `--data "$DATA"` without such a variable; as a path it would be the current folder.
        raise ValueError("a path is empty")
    return expanded(tokens[0].value)


def _as_int(_: Any, tokens: Sequence[Token]) -> int:
    """Read a whole number as it stands: cyclopts rounds 0.5 to 0."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


UserPath = Annotated[Path, Parameter(converter=_as_user_path)]
"""A path in which `~` is the home folder: of `--output=~/out` no shell makes it that."""

OptionalPath = Annotated[Path | None, Parameter(converter=_as_user_path)]

Int = Annotated[int, Parameter(converter=_as_int)]

OptionalInt = Annotated[int | None, Parameter(converter=_as_int)]

Seed = Annotated[Int, Parameter(validator=validators.Number(gte=0, lt=2**32))]
"""The range that numpy takes."""

Output = Annotated[UserPath, Parameter(name=["--output", "-o"])]

Json = Annotated[
    bool, Parameter(name="--json", negative="", help="Print one JSON document and nothing else on stdout.")
]


class UsageError(Exception):
    """Options that do not go together or are out of range: exit code 2."""


def checked(options: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Validate options, and put every problem into one message.

    Raises:
        UsageError: a value is wrong or a name unknown.
    """
    try:
        return options.model_validate(values)
    except ValidationError as error:
        raise UsageError(listed("These options cannot be used", problems(error))) from error


class Printable:
    """Anything rich can draw, with `printable` text."""

    def __init__(self, drawing: RenderableType) -> None:
        self._drawing = drawing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._drawing, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable_lines(segment.text), segment.style)


class Out(Console):
    """One of the two streams; where its reader is gone, the rest is printed to nobody."""

    def on_broken_pipe(self) -> None:
        """Go on quietly: the work may not be done yet."""
        _detach(sys.stderr if self.stderr else sys.stdout)


def _detach(stream: TextIO) -> None:
    """Let what a stream still holds, and all that follows, go nowhere, so that nothing fails at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def emit(result: BaseModel, drawing: RenderableType, *, as_json: bool, last: str = "") -> None:
    """Print a result: as JSON for programs, or drawn for people.

    Args:
        result: what a verb found or did.
        drawing: the same for people.
        as_json: which of the two goes to stdout.
        last: what people read below it. It is not wrapped, so that commands and paths can be copied.

    Raises:
        OSError: stdout cannot be written to; nobody reading it any more is no error.
    """
    try:
        if as_json:
            _write(_json(result))
        else:
            # Names of files and models are not markup.
            drawn = Text(drawing) if isinstance(drawing, str) else drawing
            Out(markup=False).print(Printable(drawn), soft_wrap=isinstance(drawing, str))
            if last:
                Out(markup=False).print(Printable(Text(last)), soft_wrap=True)
    except OSError:
        _detach(sys.stdout)
        raise


def _json(result: BaseModel) -> str:
    # Through text once, so that what is no number becomes null; in ASCII, which every encoding can hold.
    plain = json.dumps(result.model_dump(mode="json"))
    return json.dumps(json.loads(plain, parse_constant=lambda _: None), indent=2)


def _write(document: str) -> None:
    try:
        # Unlike a method of the stream it knows that there may be none.
        print(document, flush=True)  # noqa: T201
    except BrokenPipeError:
        _detach(sys.stdout)


def tell(text: str) -> None:
    """Print a line for people, on stderr."""
    Out(stderr=True, highlight=False).print(Printable(Text(text)))


def complain(message: str, *, hint: str | None = None) -> None:
    """Print one error message, on stderr."""
    console = Out(stderr=True, highlight=False, soft_wrap=True)
    console.print(Printable(Text.assemble(("Error:", "bold red"), " ", message)))
    if hint:
        console.print(Printable(Text(hint)))


def warn(messages: Iterable[str]) -> None:
    """Print what a result does not show by itself and its reader must know, on stderr."""
    console = Out(stderr=True, highlight=False, soft_wrap=True)
    for message in messages:
        console.print(Printable(Text.assemble(("Warning:", "bold yellow"), " ", message)))


class ProgressBar:
    """Progress of several stages, each one bar."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Show how far a stage is."""
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(printable(event.stage), total=event.total)
        shown = f"{event.stage}: {event.detail}" if event.detail else event.stage
        task = self._tasks[event.stage]
        self._bars.update(task, description=printable(shown), completed=event.done, total=event.total)


class ProgressLines:
    """Progress where there is no terminal: one line when a stage begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Say that a stage began."""
        if event.detail:
            tell(f"{event.stage}: {event.detail}")
        elif event.stage != self._stage:
            tell(f"{event.stage} ...")
        self._stage = event.stage


def hide_bars_of_transformers() -> None:
    """Switch off its bars for loading and saving: they would be drawn over those of `progress_bar`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


_SPEED_OVER = 1800
"""Seconds whose steps tell how long the others take."""


@contextmanager
def progress_bar() -> Generator[Progress]:
    """Show the progress of long-running work on stderr, as bars that vanish at the end, or as lines."""
    console = Out(stderr=True)
    # Colours may be forced where there is no terminal, and a dumb one draws no bars.
    if not (sys.stderr.isatty() and console.is_interactive) or console.is_dumb_terminal:
        yield ProgressLines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # A look or a refinement may take minutes from one step to the next, of which the time left is estimated.
    with Bars(*columns, console=console, transient=True, speed_estimate_period=_SPEED_OVER) as bars:
        yield ProgressBar(bars)
