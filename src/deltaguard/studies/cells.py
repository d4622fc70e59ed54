"""What a bench has measured so far: one file a cell, named by a hash of everything that produced it."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from importlib.resources import files
from inspect import getclosurevars, isfunction
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, FiniteFloat, TypeAdapter

from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.durable import write_atomically
from deltaguard.reports.records.bench import Cell

_REMEDY = "Remove it to measure it again."
_NUMBERS: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, FiniteFloat])

_WITHOUT_EFFECT = (
    "cli/",
    "reports/",
    "studies/describe.py",
    "studies/run.py",
    "studies/score.py",
    "studies/search.py",
    "evaluation/metrics/paired.py",
    "evaluation/metrics/runs.py",
)
"""Sources that choose, compare or show cells and make none; every other may change what a cell holds."""


def content_key(*parts: Any) -> str:
    """A hash of values: dataclasses, pydantic models, what JSON can hold, and functions.

    A function counts with its name and with the values it was made with, whatever the code in it (see
    `source_hash`).

    Returns:
        32 hexadecimal digits, the same in every run.

    Raises:
        TypeError: a value is of another kind.

    Example:
        >>> content_key("a", 1) == content_key("a", 1) != content_key("a", 2)
        True
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, default=_plain)
    return sha256(text.encode()).hexdigest()[:32]


def source_hash(package: Path | None = None) -> str:
    """A hash of the code and data that can change what a cell holds.

    Options, recipes and prompts are in a cell's key themselves. What an option means, how an answer is judged
    and which constants a method has stands in the code alone: after an edit of it nothing measured before is
    used again.

    Args:
        package: the folder of the package; this one's own where absent.

    Returns:
        32 hexadecimal digits.
    """
    root = Path(str(files("deltaguard"))) if package is None else package
    return content_key([(name, sha256(path.read_bytes()).hexdigest()) for name, path in _sources(root)])


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    named = {path.relative_to(root).as_posix(): path for path in root.rglob("*")}
    for name in sorted(named):
        if named[name].suffix in {".py", ".jsonl"} and not name.startswith(_WITHOUT_EFFECT):
            yield name, named[name]


class Shelf:
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

    def cell(self, key: str, fits: Callable[[Cell], bool], compute: Callable[[], Cell]) -> Cell:
        """Find the cell of a key; compute and store it where it is not there yet.

        Args:
            key: of everything that produces it.
            fits: whether a cell that was found is the one that is meant.
            compute: makes it.

        Raises:
            DeltaguardError: the file holds something else.
        """
        path = self._cells / f"{key}.json"
        if path.is_file():
            found = read_json(path, Cell, remedy=_REMEDY)
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
        """How long things took that are done once, whichever run did them."""
        return read_json(self._seconds, _NUMBERS, remedy=_REMEDY) if self._seconds.is_file() else {}


def _plain(value: Any) -> Any:
    """A value, or one that JSON can hold once its parts are plain, too."""
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
    return _recipe(value)


def _recipe(value: Any) -> dict[str, Any]:
    """What a function is and what it was made with; a class is its name."""
    if isinstance(value, partial):
        return {"function": value.func, "made with": [value.args, value.keywords]}
    if not isfunction(value) and not isinstance(value, type):
        raise TypeError(f"A {type(value).__name__} has no content that could be hashed.")
    held = dict(getclosurevars(value).nonlocals) if isfunction(value) else {}
    return {"function": f"{value.__module__}.{value.__qualname__}", "made with": held}
