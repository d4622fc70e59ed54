"""What a bench has measured so far: one file a cell, named by a hash of everything that produced it."""

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from deltaguard.checkpoints.durable import write_atomically
from deltaguard.errors import DeltaguardError
from deltaguard.report.bench import Cell

_NUMBERS: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, float])
_ANSWERS: TypeAdapter[list[str] | list[float]] = TypeAdapter(list[str] | list[float])


def content_key(*parts: Any) -> str:
    """A hash of values: dataclasses, pydantic models, and what JSON can hold.

    Returns:
        32 hexadecimal digits, the same in every run.

    Example:
        >>> content_key("a", 1) == content_key("a", 1) != content_key("a", 2)
        True
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, default=_plain)
    return sha256(text.encode()).hexdigest()[:32]


class Shelf:
    """The cells and answers of one bench folder.

    Whatever is in it is complete: files appear by renaming. So a run that was killed goes on with the first
    cell that is missing.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder, made if absent."""
        self._cells = folder / "cells"
        self._answers = folder / "answers"
        self._seconds = folder / "seconds.json"
        for made in (self._cells, self._answers):
            made.mkdir(parents=True, exist_ok=True)

    def cell(self, key: str, compute: Callable[[], Cell]) -> Cell:
        """The cell of that key, computed and stored where it is not there yet."""
        path = self._cells / f"{key}.json"
        if path.is_file():
            return _read(path, Cell.model_validate_json)
        cell = compute()
        write_atomically(path, cell.model_dump_json(indent=1) + "\n")
        return cell

    def answers(self, key: str, compute: Callable[[], list[Any]]) -> list[Any]:
        """The answers, or likelihoods, of that key, computed and stored where they are not there yet."""
        path = self._answers / f"{key}.json"
        if path.is_file():
            return _read(path, _ANSWERS.validate_json)
        found = compute()
        write_atomically(path, json.dumps(found, ensure_ascii=False, indent=0) + "\n")
        return found

    def note_seconds(self, name: str, seconds: float) -> None:
        """Keep how long something took that is done once."""
        write_atomically(self._seconds, json.dumps(self.seconds() | {name: seconds}, indent=1) + "\n")

    def seconds(self) -> dict[str, float]:
        """How long things took that are done once, whichever run did them."""
        return _read(self._seconds, _NUMBERS.validate_json) if self._seconds.is_file() else {}


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise DeltaguardError(
            f"{path} is not what this release of deltaguard writes. Remove it to measure it again: {error}"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    return value
