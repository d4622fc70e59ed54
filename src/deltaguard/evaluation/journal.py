"""What a run keeps on disk as it comes, so that one that was killed goes on where it stopped."""

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import append_journal, problems, read_journal, read_json
from deltaguard.models.durable import explained, write_atomically

TEXT: TypeAdapter[Any] = TypeAdapter(StrictStr)
"""What most files hold: one answer a prompt."""


@with_config(ConfigDict(extra="forbid"))
class SecondAnswer(TypedDict):
    """What a model answered to a second question, and the answer to the first one that it was shown."""

    after: StrictStr
    answer: StrictStr


SECOND_ANSWER: TypeAdapter[Any] = TypeAdapter(SecondAnswer)
"""What a file of answers to second questions holds for each."""

_SHOWN_CHARACTERS = 200
_SECONDS: TypeAdapter[dict[str, float]] = TypeAdapter(
    dict[str, Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]]
)

T = TypeVar("T")


class Journal(Generic[T]):
    """Rows in a file of JSON lines, each batch on the disk before the next.

    A last line that a kill cut short is dropped when the file is opened.

    Attributes:
        path: of the file; `None` keeps nothing.
        rows: those that were there when it was opened.
    """

    def __init__(
        self, path: Path | None, schema: type[T] | TypeAdapter[T], *, remedy: str, head: str = ""
    ) -> None:
        """Open a file, which is made on the first `append`.

        Args:
            path: where it lies or will lie.
            schema: what each line must hold.
            remedy: what to do where one does not, as a sentence.
            head: a first line, with its end, for a file that is made.

        Raises:
            DeltaguardError: a line holds something else, or the file cannot be read.
        """
        self.path = path
        self._head = head
        self.rows: list[T] = [] if path is None else read_journal(path, schema, remedy=remedy)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; they are on the disk when this returns."""
        if self.path is None:
            return
        text = "".join(map(json_line, rows))
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                # A file that a kill cut short in its first line is none that a later run knows.
                write_atomically(self.path, self._head + text)
                return
            append_journal(self.path, text.removesuffix("\n"))


def json_line(row: Mapping[str, Any]) -> str:
    """Write a row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


class _Head(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    made_by: dict[str, Any]


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    index: int = Field(ge=0)
    prompt: str
    value: Any


_LINE: TypeAdapter[_Head | _Row] = TypeAdapter(
    Annotated[
        Annotated[_Head, Tag("head")] | Annotated[_Row, Tag("row")],
        Discriminator(lambda line: "head" if isinstance(line, Mapping) and "made_by" in line else "row"),
    ]
)


class AnswerFile:
    """One value a prompt, of one model and one section, in a journal that first says what they depend on.

    Attributes:
        path: of the file.
        values: those there are, by the prompt's index.
    """

    def __init__(
        self,
        path: Path,
        *,
        prompts: Sequence[str],
        made_by: Mapping[str, Any],
        schema: TypeAdapter[Any] = TEXT,
    ) -> None:
        """Open a file, which is made on the first `add`.

        Args:
            path: where it lies or will lie.
            prompts: what was asked, written beside each value for those who read the file.
            made_by: everything that the values depend on, as JSON holds it.
            schema: what each value must be.

        Raises:
            DeltaguardError: it holds values of another model, suite or engine, or is damaged.
        """
        self.path = path
        self.values: dict[int, Any] = {}
        self._prompts = prompts
        self._made_by = json.loads(json.dumps(made_by))
        self._schema = schema
        remedy = "Remove this file to have its answers generated again; all others stay as they are."
        with explained(path):
            self._journal = Journal(path, _LINE, remedy=remedy, head=json_line({"made_by": self._made_by}))
            if path.exists() and not self._journal.rows:
                path.unlink()
        if not self._journal.rows:
            return
        head, *rows = self._journal.rows
        if not isinstance(head, _Head):
            raise DeltaguardError(
                f"{path} does not begin with what its answers were made by (`made_by`). {remedy}"
            )
        self._require_same_origin(head.made_by)
        wrong = [problem for n, line in enumerate(rows, start=2) for problem in self._take(n, line)]
        if wrong:
            raise DeltaguardError(f"{listed(f'{path} is damaged', wrong)}\n{remedy}")

    @property
    def missing(self) -> list[int]:
        """Indices of the prompts that have no value yet."""
        return [i for i in range(len(self._prompts)) if i not in self.values]

    def add(self, indices: Sequence[int], values: Sequence[Any]) -> None:
        """Append values; they are on disk when this returns."""
        self._journal.append([self._row(i, value) for i, value in zip(indices, values, strict=True)])
        self.values.update(zip(indices, values, strict=True))

    def in_order(self) -> list[Any]:
        """List the values in the order of the prompts, `None` where one is missing."""
        return [self.values.get(i) for i in range(len(self._prompts))]

    def sort(self) -> str:
        """Put the values in the order of the prompts, whatever the order they came in.

        Returns:
            sha256 of the file.
        """
        rows = [{"made_by": self._made_by}, *(self._row(i, self.values[i]) for i in sorted(self.values))]
        text = "".join(map(json_line, rows))
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text)
        return sha256(text.encode()).hexdigest()

    def _row(self, index: int, value: Any) -> dict[str, Any]:
        return {"index": index, "prompt": self._prompts[index], "value": value}

    def _take(self, number: int, line: _Head | _Row) -> list[str]:
        """Keep the value of a line, or say what is wrong with it."""
        if isinstance(line, _Head):
            return [f"line {number}: another `made_by`"]
        if line.index >= len(self._prompts):
            return [f"line {number}: index {line.index}, and there are {len(self._prompts)} prompts"]
        if line.index in self.values:
            return [f"line {number}: index {line.index} a second time"]
        if line.prompt != self._prompts[line.index]:
            return [f"line {number}: the prompt is not that of index {line.index}"]
        try:
            value = self._schema.validate_python(line.value)
        except ValidationError as error:
            return [f"line {number}, value: {problem}" for problem in problems(error)]
        self.values[line.index] = self._schema.dump_python(value)
        return []

    def _require_same_origin(self, made_by: Mapping[str, Any]) -> None:
        names = [*self._made_by, *(name for name in made_by if name not in self._made_by)]
        pairs = {name: (made_by.get(name), self._made_by.get(name)) for name in names}
        differing = [
            f"{name[:_SHOWN_CHARACTERS]} was {_short(before)} and is now {_short(now)}"
            for name, (before, now) in pairs.items()
            if before != now
        ]
        if differing:
            raise DeltaguardError(
                f"{listed(f'{self.path} holds answers of another run', differing)}\nChoose another output "
                "folder, or run with the suite, engine and models that the folder was begun with."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


@dataclass(frozen=True)
class Clock:
    """Wall times of the stages of an evaluation, kept in a file over all runs in its folder.

    Attributes:
        path: the file; made when the first stage ends.
    """

    path: Path

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by stage so far.

        Raises:
            DeltaguardError: the file is not what this class writes.
        """
        if not self.path.exists():
            return {}
        remedy = "It holds how long the stages took so far: remove it, which loses nothing else."
        return read_json(self.path, _SECONDS, remedy=remedy)

    @contextmanager
    def timed(self, stage: str) -> Generator[None]:
        """Add the time of a block to a stage, also where the block fails; a kill loses it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            found = self.seconds
            found[stage] = found.get(stage, 0.0) + time.perf_counter() - started
            write_atomically(self.path, json.dumps(found, indent=1) + "\n")
