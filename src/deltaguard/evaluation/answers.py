"""What models answered, on disk as it comes, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from deltaguard.checkpoints.durable import explained, write_atomically
from deltaguard.errors import DeltaguardError


class AnswerFile:
    """One value a prompt, of one model and one section: JSON lines, each batch flushed before the next.

    The first line says what the values depend on. A last line that a kill cut short is dropped.

    Attributes:
        path: of the file.
        values: those there are, by the prompt's index.
    """

    def __init__(self, path: Path, *, prompts: Sequence[str], made_by: Mapping[str, Any]) -> None:
        """Open a file, which is made on the first `add`.

        Args:
            path: where it lies or will lie.
            prompts: what was asked, written beside each value for those who read the file.
            made_by: everything that the values depend on, as JSON holds it.

        Raises:
            DeltaguardError: it holds values of another model, suite or engine, or cannot be read.
        """
        self.path = path
        self.values: dict[int, Any] = {}
        self._prompts = prompts
        self._made_by = json.loads(json.dumps(made_by))
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
                lines.insert(0, json.dumps({"made_by": self._made_by}, ensure_ascii=False) + "\n")
            with self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
                stream.flush()
                os.fsync(stream.fileno())
        self.values.update(zip(indices, values, strict=True))

    def in_order(self) -> list[Any]:
        """All values, in the order of the prompts."""
        return [self.values[i] for i in range(len(self._prompts))]

    def settle(self) -> str:
        """Put the values in the order of the prompts, whatever the order they came in.

        Returns:
            sha256 of the file.
        """
        head = json.dumps({"made_by": self._made_by}, ensure_ascii=False) + "\n"
        text = head + "".join(self._line(i, self.values[i]) for i in range(len(self._prompts)))
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text)
        return sha256(text.encode()).hexdigest()

    def _line(self, index: int, value: Any) -> str:
        row = {"index": index, "prompt": self._prompts[index], "value": value}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self.path, len(whole))
        if not whole:
            self.path.unlink()
            return
        try:
            head, *rows = [json.loads(line) for line in whole.split(b"\n")[:-1]]
            made_by = head["made_by"]
            self.values = {row["index"]: row["value"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise DeltaguardError(
                f"The answers in {self.path} cannot be read ({error!r}): remove the file to have them "
                "generated again."
            ) from error
        self._check(made_by)

    def _check(self, made_by: Mapping[str, Any]) -> None:
        names = [*self._made_by, *(name for name in made_by if name not in self._made_by)]
        differing = [
            f"{name} was {made_by.get(name)!r} and is now {self._made_by.get(name)!r}"
            for name in names
            if made_by.get(name) != self._made_by.get(name)
        ]
        if differing:
            raise DeltaguardError(
                f"{self.path} holds answers of another run: {'; '.join(differing)}. Choose another output "
                "folder, or run with the suite, engine and models that the folder was begun with."
            )
