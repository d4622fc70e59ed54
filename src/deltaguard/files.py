"""The one reader of JSON, JSON lines, YAML and text that may be damaged or made to do harm.

Whatever a file holds, reading it ends, and ends in what its schema describes or in one message that names the
file, the field, the value and what to do.
"""

import difflib
import os
import re
import stat
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from deltaguard.errors import DeltaguardError, listed
from deltaguard.text import printable, shortened

MAX_BYTES = 256 << 20
"""A file of text may be so large; the largest tokenizers and indices have a tenth of it."""

MAX_YAML_BYTES = 256 << 10
"""What YAML is parsed with needs ten seconds for a megabyte."""

MAX_YAML_DEPTH = 50

ANY_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
"""A JSON object of which nothing more is asked."""

_BOM = b"\xef\xbb\xbf"
_SHOWN_CHARACTERS = 80
_MOST_DIGITS = 100

T = TypeVar("T")


def expanded(reference: str | Path) -> Path:
    """Find the path that a reference would be, with a home folder in the place of `~`.

    Whatever the reference holds, there is a path; ask it with `os.path`, which unlike pathlib raises nothing.
    """
    try:
        return Path(os.path.expanduser(reference))  # noqa: PTH111  # pathlib raises for an unknown user
    except ValueError:
        return Path(reference)


def read_file(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read all of a regular file.

    Args:
        path: the file; a pipe or device is refused without waiting for it.
        max_bytes: its size at most.

    Raises:
        DeltaguardError: it cannot be read, is no regular file, or is larger.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        # The second where it is no name at all, as a file that names others may hold.
        reason = error.strerror if isinstance(error, OSError) else error
        raise DeltaguardError(f"{path} cannot be read: {reason}.") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise DeltaguardError(f"{path} is no regular file, so it is not read.")
    with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor has no path to open
        if found.st_size > max_bytes:
            raise DeltaguardError(
                f"{path} has {found.st_size:,} bytes; a file of its kind has {max_bytes:,} at most."
            )
        try:
            return file.read()
        except OSError as error:
            raise DeltaguardError(f"{path} cannot be read: {error.strerror}.") from error


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8, without the byte order mark that some editors put first.

    Raises:
        DeltaguardError: it cannot be read, is too large (see `read_file`), or is not UTF-8.
    """
    try:
        return read_file(path, max_bytes=max_bytes).removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise DeltaguardError(
            f"{path} is not text in UTF-8: byte {error.object[error.start]:#04x} at position {error.start}. "
            "Save it in UTF-8."
        ) from error


def read_json(path: Path, schema: type[T] | TypeAdapter[T], *, remedy: str) -> T:
    """Read a JSON file that a schema describes.

    Args:
        path: the file, UTF-8.
        schema: what it must hold; a model with a field `schema_version` of another default is told as that.
        remedy: what to do where it does not, as a sentence.

    Raises:
        DeltaguardError: the file cannot be read or holds something else. All problems are listed.

    Example:
        >>> read_json(Path("config.json"), ANY_OBJECT, remedy="Copy it again.")  # doctest: +SKIP
        {'model_type': 'llama'}
    """
    return parse_json(read_file(path), schema, source=str(path), remedy=remedy)


def parse_json(content: bytes, schema: type[T] | TypeAdapter[T], *, source: str, remedy: str) -> T:
    """Read JSON that a schema describes from bytes in memory; the arguments are those of `read_json`.

    Args:
        content: UTF-8; nesting beyond 200 levels, lone surrogates and numbers of over 4,300 digits are
            refused.
        schema: what it must hold.
        source: where the bytes are from, for messages.
        remedy: what to do where it holds something else.

    Raises:
        DeltaguardError: the bytes hold something else. All problems are listed.
    """
    content = content.removeprefix(_BOM)
    _refuse_other_version(content, schema, source, remedy)
    try:
        return _adapter(schema).validate_json(content)
    except ValidationError as error:
        raise DeltaguardError(f"{listed(f'{source} cannot be used', problems(error))}\n{remedy}") from error


def read_json_lines(path: Path, schema: type[T] | TypeAdapter[T], *, remedy: str) -> list[T]:
    """Read a file with one JSON document a line, every one of which a schema describes.

    Args:
        path: the file, UTF-8; empty lines are skipped.
        schema: what each line must hold.
        remedy: what to do where one does not, as a sentence.

    Raises:
        DeltaguardError: the file cannot be read, or lines hold something else. They are listed.
    """
    return _parsed_lines(read_file(path).removeprefix(_BOM), schema, source=str(path), remedy=remedy)


def read_data(name: str, schema: type[T] | TypeAdapter[T]) -> list[T]:
    """Read a file of JSON lines that comes with deltaguard.

    Args:
        name: of the file in the package's folder `data`.
        schema: what each line must hold.

    Raises:
        DeltaguardError: the installation is damaged.
    """
    path = Path(str(files("deltaguard"))) / "data" / name
    return read_json_lines(path, schema, remedy="Install deltaguard again.")


def read_journal(path: Path, schema: type[T] | TypeAdapter[T], *, remedy: str) -> list[T]:
    """Read what a run appended to a file of JSON lines before it was interrupted.

    A last line that a kill cut short is removed from the file, so that the next one begins where it should.
    That is done to no file but a journal: one that begins with whole lines of it, and is no link to another.

    Args:
        path: the file; none where it is absent.
        schema: what each line must hold.
        remedy: what to do where one does not, as a sentence.

    Raises:
        DeltaguardError: the file cannot be read, is a link, holds no whole line, or one that is something
            else.
    """
    if path.is_symlink():
        raise DeltaguardError(f"{path} is a link, which no run leaves there: remove it. {remedy}")
    if not path.exists():
        return []
    content = read_file(path)
    whole = content[: content.rfind(b"\n") + 1]
    if content and not whole:
        raise DeltaguardError(f"{path} holds the beginning of one line and no more: remove it. {remedy}")
    found = _parsed_lines(whole, schema, source=str(path), remedy=remedy)
    if len(whole) < len(content):
        try:
            os.truncate(path, len(whole))
        except OSError as error:
            raise DeltaguardError(f"{path} cannot be written to: {error.strerror}.") from error
    return found


def append_journal(path: Path, line: str) -> None:
    """Append a line to a file of JSON lines that `read_journal` reads, on disk when this returns.

    Where the operating system refuses, as it does on a full disk, the file is left as it was: half a line
    would spoil the next one. Whatever keeps progress in JSON lines appends by this.

    Args:
        path: the file; made if absent.
        line: one JSON document, without a line break.

    Raises:
        OSError: the file cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            # On a disk that is nearly full a first part may be written without an error.
            rest = line.encode() + b"\n"
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def read_yaml(path: Path, schema: type[T] | TypeAdapter[T], *, remedy: str) -> T:
    """Read a YAML file (JSON is YAML) that a schema describes.

    Args:
        path: the file, UTF-8.
        schema: what it must hold.
        remedy: what to do where it does not, as a sentence.

    Raises:
        DeltaguardError: the file cannot be read or holds something else. All problems are listed.
    """
    text = read_text(path, max_bytes=MAX_YAML_BYTES)
    return parse_yaml(text, schema, source=str(path), remedy=remedy)


def parse_yaml(text: str, schema: type[T] | TypeAdapter[T], *, source: str, remedy: str) -> T:
    """Read YAML that a schema describes from text in memory; the arguments are those of `read_yaml`.

    Anchors are refused: a few of them, nested, stand for more than fits into memory.

    Raises:
        DeltaguardError: the text is too long, or holds something else. All problems are listed.
    """
    if len(text) > MAX_YAML_BYTES:
        raise DeltaguardError(
            f"{source} has {len(text):,} characters; {MAX_YAML_BYTES:,} are read as YAML at most. {remedy}"
        )
    try:
        content: Any = yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader with more refusals
    # PyYAML lets through what Python says of dates, numbers and keys that cannot be.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise DeltaguardError(f"{source} cannot be read as YAML: {reason}. {remedy}") from error
    try:
        return _adapter(schema).validate_python(content)
    except ValidationError as error:
        raise DeltaguardError(f"{listed(f'{source} cannot be used', problems(error))}\n{remedy}") from error


def problems(error: ValidationError) -> list[str]:
    """List the problems that a schema has with a document: the field, what is wrong, and the value.

    Example:
        >>> try:
        ...     ANY_OBJECT.validate_python([1])
        ... except ValidationError as error:
        ...     problems(error)
        ["Input should be a valid dictionary (it is [1])"]
    """
    return [_problem(each) for each in error.errors(include_url=False)]


def _problem(found: ErrorDetails) -> str:
    where = printable(".".join(map(str, found["loc"])))
    what = found["msg"].removeprefix("Value error, ")
    if found["type"] == "literal_error" and isinstance(found["input"], str):
        known = re.findall("'([^']*)'", str(found.get("ctx", {}).get("expected", "")))
        close = difflib.get_close_matches(found["input"], known, n=1)
        what += f'. Did you mean "{close[0]}"?' if close else ""
    # What a whole document or all options together break names its values itself.
    if found["type"] in ("json_invalid", "missing") or (found["type"] == "value_error" and not where):
        return f"`{where}`: {what}" if where else what
    shown = shortened(repr(found["input"]), _SHOWN_CHARACTERS)
    return f"`{where}`: {what} (it is {shown})" if where else f"{what} (it is {shown})"


def _adapter(schema: type[T] | TypeAdapter[T]) -> TypeAdapter[T]:
    return schema if isinstance(schema, TypeAdapter) else TypeAdapter(schema)


class _Versioned(BaseModel):
    schema_version: int


def _refuse_other_version(content: bytes, schema: Any, source: str, remedy: str) -> None:
    """Say that a document is of another version, before its fields are found to be or mean something else."""
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        return
    field = schema.model_fields.get("schema_version")
    if field is None:
        return
    try:
        given = _Versioned.model_validate_json(content).schema_version
    except ValidationError:
        return
    if given != field.default:
        raise DeltaguardError(
            f"{source} has schema version {given}, and this release reads version {field.default}. {remedy}"
        )


def _parsed_lines(content: bytes, schema: type[T] | TypeAdapter[T], *, source: str, remedy: str) -> list[T]:
    adapter = _adapter(schema)
    found: list[T] = []
    wrong: list[str] = []
    # Not splitlines: JSON text may hold U+2028 and its kind, which end no line here.
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            if line.strip():
                found.append(adapter.validate_json(line))
        except ValidationError as error:
            wrong += [f"line {number}: {problem}" for problem in problems(error)]
    if wrong:
        raise DeltaguardError(f"{listed(f'{source} cannot be used', wrong)}\n{remedy}")
    return found


class _Loader(yaml.SafeLoader):
    """YAML without anchors, deep nesting, endless numbers and text that no file can hold."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not allowed: write the value out")
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_YAML_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        value.encode()
        if node.tag == "tag:yaml.org,2002:int" and len(value) > _MOST_DIGITS:
            raise yaml.YAMLError(f"there is a number of {len(value):,} digits{node.start_mark}")
        if "\0" in value:
            raise yaml.YAMLError("text with a zero byte, which no name of a file can hold, is not allowed")
        return value
