"""Rows of a local data file: CSV, TSV, JSON, JSON lines or parquet."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pydantic import TypeAdapter

from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.files import MAX_BYTES, read_file, read_json, read_json_lines, read_text
from deltaguard.models.loading import foreign

Row = Mapping[str, object]

ONLY_COLUMN = "prompt"
"""The column of files that hold nothing but texts, without a name for them."""

_LIST_KEYS = ("instructions", "prompts")
_MOST_ROWS = 1_000_000


def read_rows(path: Path, *, headerless: bool = False) -> list[Row]:
    """Read all rows of a file, or of the CSV files of a folder in the order of their names.

    Args:
        path: the file or folder. A JSON file holds a list, or an object with a list under `instructions` or
            `prompts`, or with one list among its values; the items are objects, or texts alone, whose
            column is then called `prompt`.
        headerless: a CSV file with one column has no header: its first row is data too. One whose first row
            is `prompt` or `instruction` has a header all the same.

    Returns:
        One mapping a row, from column to value.

    Raises:
        DeltaguardError: the file cannot be read, is of an unknown type, or does not hold rows.
    """
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise DeltaguardError(f"The folder {path} holds no CSV file: give the data file itself.")
        return [row for file in files for row in read_rows(file, headerless=headerless)]
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DeltaguardError(
            f"{path} has the ending {path.suffix!r}; data files end with {', '.join(_READERS)}. Convert it, "
            "or unpack it where it is compressed."
        )
    return _texts(path) if headerless and path.suffix.lower() == ".csv" else reader(path)


def _cells(path: Path, delimiter: str) -> list[list[str]]:
    """Find the cells of a file, row by row; empty rows are left out."""
    lines = io.StringIO(read_text(path), newline="")
    try:
        return [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except csv.Error as error:
        raise DeltaguardError(f"The data file {path} cannot be read: {error}.") from error


def _csv(path: Path, delimiter: str = ",") -> list[Row]:
    header, *rows = _cells(path, delimiter) or [[]]
    broken = [i for i, row in enumerate(rows, start=1) if len(row) > len(header)]
    if broken:
        raise DeltaguardError(
            f"{len(broken)} rows of {path} have more fields than its header, the first being row "
            f"{broken[0]}: put quotes around texts that hold {delimiter!r}."
        )
    # A cell without text is no text: the format cannot tell the two apart.
    return [{column: text or None for column, text in zip_longest(header, row)} for row in rows]


def _texts(path: Path) -> list[Row]:
    """Give a CSV file of one column without a header; a header that is there is seen by its name."""
    rows = _cells(path, ",")
    if rows and {name.casefold() for name in rows[0]} & {"prompt", "instruction"}:
        return _csv(path)
    wide = [i for i, row in enumerate(rows, start=1) if len(row) > 1]
    if wide:
        raise DeltaguardError(
            f"{len(wide)} rows of {path} have more than one field, the first being row {wide[0]}: give a "
            "file of one column, or one with a header that names the column `prompt`."
        )
    return [{ONLY_COLUMN: row[0]} for row in rows]


def _json(path: Path) -> list[Row]:
    value = read_json(path, TypeAdapter(object), remedy="It must hold a list of objects or texts.")
    if isinstance(value, dict):
        # Lists of tags and the like may stand beside that of the rows.
        content = cast("dict[str, object]", value)
        lists = {key: item for key, item in content.items() if isinstance(item, list)}
        named = [lists[key] for key in _LIST_KEYS if key in lists]
        if named or len(lists) == 1:
            value = (named or list(lists.values()))[0]
    if not isinstance(value, list):
        raise DeltaguardError(
            f"{path} holds a JSON {type(value).__name__}: it must hold a list, or an object with a list "
            f"under {' or '.join(_LIST_KEYS)}, or with one list among its values."
        )
    return _as_rows(path, cast("list[object]", value))


def _jsonl(path: Path) -> list[Row]:
    remedy = "Each line must hold an object or a text."
    return _as_rows(path, read_json_lines(path, TypeAdapter(object), remedy=remedy))


def _as_rows(path: Path, items: Sequence[object]) -> list[Row]:
    rows = [{ONLY_COLUMN: item} if isinstance(item, str) else item for item in items]
    odd = [i for i, row in enumerate(rows, start=1) if not isinstance(row, dict)]
    if odd:
        kind = type(items[odd[0] - 1]).__name__
        raise DeltaguardError(
            f"{len(odd)} of {len(items)} items of {path} are neither objects nor texts, the first being item "
            f"{odd[0]}, a {kind}."
        )
    return cast("list[Row]", rows)


def _parquet(path: Path) -> list[Row]:
    require_packages(f"Reading {path}", "eval", "pyarrow")
    from pyarrow import parquet

    content = io.BytesIO(read_file(path))
    with foreign(f"The parquet file {path} cannot be read"):
        file: Any = parquet.ParquetFile(content)
        count: int = file.metadata.num_rows
        size: int = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    # A few bytes of such a file may stand for any number of rows.
    if count > _MOST_ROWS or size > MAX_BYTES:
        raise DeltaguardError(
            f"{path} has {count:,} rows of {size:,} bytes in all; {_MOST_ROWS:,} rows of {MAX_BYTES:,} bytes "
            "are read at most. Give a file with the rows that are wanted."
        )
    with foreign(f"The parquet file {path} cannot be read"):
        return file.read().to_pylist()


_READERS: Mapping[str, Callable[[Path], list[Row]]] = MappingProxyType(
    {
        ".csv": _csv,
        ".tsv": partial(_csv, delimiter="\t"),
        ".json": _json,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
)
