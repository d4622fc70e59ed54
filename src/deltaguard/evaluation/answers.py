"""What models answered, on disk as it comes, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictStr, Tag, TypeAdapter, ValidationError

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import problems, read_journal
from deltaguard.models.durable import explained, write_atomically

TEXT: TypeAdapter[Any] = TypeAdapter(StrictStr)
"""What most files hold: one answer a prompt."""

_SHOWN_CHARACTERS = 200


class _Head(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    made_by: dict[str, Any]


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    index: int = Field(ge=0)
    prompt: str
    value: Any


def _kind(line: Any) -> str:
    return "head" if isinstance(line, Mapping) and "made_by" in line else "row"


_LINE: TypeAdapter[_Head | _Row] = TypeAdapter(
    Annotated[Annotated[_Head, Tag("head")] | Annotated[_Row, Tag("row")], Discriminator(_kind)]
)


class AnswerFile:
    """One value a prompt, of one model and one section: JSON lines, each batch flushed before the next.

    The first line says what the values depend on. A last line that a kill cut short is dropped.

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
        if path.exists():
            with explained(path):
                self._read()

    @property
    def missing(self) -> list[int]:
        """Indices of the prompts that have no value yet."""
        return [i for i in range(len(self._prompts)) if i not in self.values]

    def add(self, indices: Sequence[int], values: Sequence[Any]) -> None:
        """Append values; they are on disk when this returns."""
        lines = [self._line(i, value) for i, value in zip(indices, values, strict=True)]
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                lines.insert(0, self._head())
            with self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
                stream.flush()
                os.fsync(stream.fileno())
        self.values.update(zip(indices, values, strict=True))

    def in_order(self) -> list[Any]:
        """List the values in the order of the prompts, `None` where one is missing."""
        return [self.values.get(i) for i in range(len(self._prompts))]

    def settle(self) -> str:
        """Put the values in the order of the prompts, whatever the order they came in.

        Returns:
            sha256 of the file.
        """
        text = self._head() + "".join(self._line(i, self.values[i]) for i in sorted(self.values))
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text)
        return sha256(text.encode()).hexdigest()

    def _head(self) -> str:
        return json.dumps({"made_by": self._made_by}, ensure_ascii=False) + "\n"

    def _line(self, index: int, value: Any) -> str:
        row = {"index": index, "prompt": self._prompts[index], "value": value}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _read(self) -> None:
        remedy = "Remove this file to have its answers generated again; all others stay as they are."
        lines = read_journal(self.path, _LINE, remedy=remedy)
        if not lines:
            self.path.unlink()
            return
        if not isinstance(lines[0], _Head):
            raise DeltaguardError(
                f"{self.path} does not begin with what its answers were made by (`made_by`). {remedy}"
            )
        self._require_same_origin(lines[0].made_by)
        wrong = [problem for n, line in enumerate(lines[1:], start=2) for problem in self._take(n, line)]
        if wrong:
            raise DeltaguardError(f"{listed(f'{self.path} is damaged', wrong)}\n{remedy}")

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
