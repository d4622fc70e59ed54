"""What a bench has measured so far: one file a cell, named by a hash of everything that produced it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from inspect import isfunction
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, FiniteFloat, TypeAdapter

from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.durable import write_atomically
from deltaguard.reports.records.attacks import AttackCell
from deltaguard.reports.records.bench import Cell

CellT = TypeVar("CellT", Cell, AttackCell)

_REMEDY = "Remove it to measure it again."
_NUMBERS: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, FiniteFloat])

PROTOCOL = 9
"""Rises with every change of what a method does, how a model is made, or how an answer is judged, so that
nothing measured before is used again. Options, recipes and what is asked are in a cell's key, and the prompts
that a restore depends on in the origin of a bench."""


def content_key(*parts: Any) -> str:
    """Hash values: dataclasses, pydantic models, what JSON can hold, and functions by their names.

    Returns:
        32 hexadecimal digits, the same in every run.

    Raises:
        TypeError: a value is of another kind, or a function holds values of its own.

    Example:
        >>> content_key("a", 1) == content_key("a", 1) != content_key("a", 2)
        True
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, default=_plain)
    return sha256(text.encode()).hexdigest()[:32]


class CellStore:
    """The cells of one bench folder.

    Whatever is in it is complete: files appear by renaming. So a run that was killed goes on with the first
    cell that is missing.

    Attributes:
        folder: of the bench.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder, made if absent."""
        self.folder = folder
        self._cells = folder / "cells"
        self._seconds = folder / "seconds.json"
        self._cells.mkdir(parents=True, exist_ok=True)

    def cell(
        self, key: str, kind: type[CellT], fits: Callable[[CellT], bool], compute: Callable[[], CellT]
    ) -> CellT:
        """Find the cell of a key; compute and store it where it is not there yet.

        Args:
            key: of everything that produces it.
            kind: its schema.
            fits: whether a cell that was found is the one that is meant.
            compute: makes it.

        Raises:
            DeltaguardError: the file holds something else.
        """
        path = self._cells / f"{key}.json"
        if path.is_file():
            found = read_json(path, kind, remedy=_REMEDY)
            if found.key != key or not fits(found):
                raise DeltaguardError(f"{path} holds another cell than its name says. {_REMEDY}")
            return found
        cell = compute()
        write_atomically(path, cell.model_dump_json(indent=1) + "\n")
        return cell

    def note_seconds(self, name: str, seconds: float) -> None:
        """Keep how long something took that is done once."""
        write_atomically(self._seconds, json.dumps(self.seconds() | {name: seconds}, indent=1) + "\n")

    def seconds(self) -> dict[str, float]:
        """Read how long things took that are done once, whichever run did them."""
        return read_json(self._seconds, _NUMBERS, remedy=_REMEDY) if self._seconds.is_file() else {}


def _plain(value: Any) -> Any:
    """Give a value, or one that JSON can hold once its parts are plain, too."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float | list | tuple):
        return value
    # Whatever its code: that is what `PROTOCOL` is for.
    if isinstance(value, type) or (isfunction(value) and value.__closure__ is None):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"A {type(value).__name__} has no content that could be hashed.")
