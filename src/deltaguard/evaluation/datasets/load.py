"""Questions from a public data set (`sets.yaml` says which there are) or from a user's own file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter

from deltaguard.chat.conversations import sample
from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.evaluation.datasets.rows import ONLY_COLUMN, Row, read_rows
from deltaguard.evaluation.exchange import FollowUp, Question
from deltaguard.files import expanded, parse_yaml
from deltaguard.models.loading import foreign


class DatasetSpec(BaseModel):
    """One set of questions, or the part of it that is used.

    Attributes:
        title: for people.
        hub_id: the repository on the Hub.
        config: the repository's configuration, `None` for its only one.
        hub_files: pattern of the repository's files, where it does not say itself which belong to the split.
        split: the split that is used.
        headerless: the CSV files of the release have no header: one request a row.
        prompt_columns: what the request's column is called; the first that a file has counts.
        expected_columns: likewise of the right answer; empty where there is none.
        reference_columns: likewise of a right answer that only some of the rows have.
        turns: whether these columns hold lists, a text for each of the two turns of a conversation.
        keep: which rows belong to the set, by column: a pattern of its text with `*`, or `!` before one that
            must not fit; the first column that a file has counts, and a file that has none of them is refused
            unless `all_without_filter`.
        all_without_filter: releases without any of the columns of `keep` hold nothing but the set.
        instruction: written before each request, a blank line between.
        terms: licence and terms of use.
        homepage: where to get it, and to read its terms.
        paper: what to cite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    hub_id: str
    config: str | None = None
    hub_files: str | None = None
    split: str
    headerless: bool = False
    prompt_columns: tuple[str, ...]
    expected_columns: tuple[str, ...] = ()
    reference_columns: tuple[str, ...] = ()
    turns: bool = False
    keep: Mapping[str, str] = {}
    all_without_filter: bool = False
    instruction: str = ""
    terms: str
    homepage: str
    paper: str

    def keeps(self, row: Row, column: str) -> bool:
        """Tell whether a row belongs to the set, told by a column of `keep` as the file writes it."""
        pattern = self.keep[column.strip().casefold()]
        fits = fnmatchcase(str(row.get(column)).strip().casefold(), pattern.removeprefix("!"))
        return fits != pattern.startswith("!")


DATASETS: Mapping[str, DatasetSpec] = MappingProxyType(
    parse_yaml(
        (files("deltaguard.evaluation.datasets") / "sets.yaml").read_text(encoding="utf-8"),
        TypeAdapter(dict[str, DatasetSpec]),
        source="The list of data sets",
        remedy="Install deltaguard again.",
    )
)
"""All of them by name."""


@dataclass(frozen=True)
class Loaded:
    """What was read.

    Attributes:
        questions: each once.
        source: where they come from, for messages.
        note: that rows were left out, since others hold the same question to the letter; `None` where none
            were.
    """

    questions: tuple[Question, ...]
    source: str
    note: str | None


def load_questions(
    name_or_path: str | Path, *, path: str | Path | None = None, count: int | None = None, seed: int = 0
) -> list[Question]:
    """Read the questions of a data set, each once, in the order of the file.

    Args:
        name_or_path: a name in `DATASETS`, or a file of one's own with the column `prompt` and, optionally,
            `system` and `expected` (or `response`). A local file always comes before a name.
        path: file of the named set, where it is at hand; otherwise it is fetched from the Hub.
        count: how many are drawn; all of them where absent. Fewer with the same seed are among more.
        seed: fixes the draw.

    Returns:
        The questions. An expected answer is kept as the set has it, worked solution included.

    Raises:
        DeltaguardError: there is no such file or set, the Hub cannot be reached or asks to accept terms, the
            columns are others, a text is missing, or there are fewer questions than `count`.

    Example:
        >>> load_questions("xstest-safe", path="xstest_prompts.csv", count=50)  # doctest: +SKIP
    """
    loaded = load_set(name_or_path, path=path)
    if count is None:
        return list(loaded.questions)
    return drawn(loaded.questions, count, seed, loaded.source)


def load_set(name_or_path: str | Path, *, path: str | Path | None = None) -> Loaded:
    """Read all questions of a data set, with what a reader must know of them.

    Args:
        name_or_path: as in `load_questions`.
        path: likewise.

    Raises:
        DeltaguardError: as in `load_questions`.
    """
    own = expanded(name_or_path)
    if path is None and os.path.isfile(own):  # noqa: PTH113
        source = str(own)
        found = _own(read_rows(own), source)
    elif (spec := DATASETS.get(str(name_or_path))) is None:
        raise DeltaguardError(
            f"There is no file {own} (looked for {own.absolute()}) and no data set of that name. Known sets: "
            f"{', '.join(DATASETS)}."
        )
    elif path is None:
        source = f"{spec.hub_id} on the Hub"
        found = _named(spec, _from_hub(spec), source)
    else:
        file = expanded(path)
        if not os.path.exists(file):  # noqa: PTH110
            raise DeltaguardError(
                f"There is no file {file} (looked for {file.absolute()}). {_where_to_get(spec)}"
            )
        source = str(file)
        found = _named(spec, read_rows(file, headerless=spec.headerless), source)
    questions = tuple(dict.fromkeys(found))
    if not questions:
        raise DeltaguardError(f"{source} holds no question.")
    repeated = (
        f"{len(found) - len(questions)} of {len(found)} rows of {source} repeat the question of another"
    )
    note = f"{repeated} and were left out." if len(questions) < len(found) else None
    return Loaded(questions, source, note)


def drawn(questions: Sequence[Question], count: int, seed: int, source: str) -> list[Question]:
    """Draw some of the questions, in their order.

    Args:
        questions: all there are.
        count: how many are drawn. Fewer with the same seed are among more.
        seed: fixes the draw.
        source: where they come from, for the message.

    Raises:
        DeltaguardError: there are fewer than `count`.
    """
    if not 0 < count <= len(questions):
        raise DeltaguardError(
            f"{count} questions were asked for and {source} holds {len(questions)}. Lower `count`, or leave "
            "it out for all."
        )
    return sample(questions, count, seed=seed)


def _where_to_get(spec: DatasetSpec) -> str:
    return (
        f"{spec.title} ({spec.paper}) does not come with deltaguard: get it from {spec.homepage}, or from "
        f"the Hub as {spec.hub_id}. Its terms: {spec.terms}"
    )


def _from_hub(spec: DatasetSpec) -> Sequence[Row]:
    hint = f" Or give the path of a file. {_where_to_get(spec)}"
    require_packages(f"Fetching {spec.title} from the Hub", "eval", "datasets", hint=hint)
    from datasets import load_dataset

    options: dict[str, Any] = {} if spec.hub_files is None else {"data_files": spec.hub_files}
    if spec.headerless:
        options["column_names"] = [ONLY_COLUMN]
    advice = (
        f"{_where_to_get(spec)} If the repository asks for it, accept its terms at "
        f"https://huggingface.co/datasets/{spec.hub_id} and run `hf auth login`; or give the path of a file "
        "of your own."
    )
    with foreign(f"{spec.title} could not be fetched from the Hub. {advice} The reason"):
        return list(load_dataset(spec.hub_id, spec.config, split=spec.split, **options))


def _named(spec: DatasetSpec, rows: Sequence[Row], source: str) -> list[Question]:
    columns = _columns(rows)
    prompt = _first(columns, spec.prompt_columns)
    expected = _first(columns, spec.expected_columns)
    chosen = _first(columns, tuple(spec.keep))
    needed = [(prompt, spec.prompt_columns), (expected, spec.expected_columns)]
    needed += [] if spec.all_without_filter else [(chosen, tuple(spec.keep))]
    lacking = [_quoted(wanted, " or ") for found, wanted in needed if wanted and found is None]
    if prompt is None or lacking:
        raise DeltaguardError(
            f"{source} does not look like {spec.title}: it has the columns {_quoted(columns)}, and lacks "
            f"{' and '.join(lacking)}. {_where_to_get(spec)}"
        )
    reference = _first(columns, spec.reference_columns)
    head = f"{spec.instruction}\n\n" if spec.instruction else ""

    def read(row: Row, i: int) -> FollowUp:
        right = _optional(row, reference, i, source) if expected is None else _text(row, expected, i, source)
        return FollowUp(head + _text(row, prompt, i, source), right)

    found: list[Question] = []
    for i, row in enumerate(rows, start=1):
        if chosen is not None and not spec.keeps(row, chosen):
            continue
        turns = _turns(row, prompt, reference, i, source) if spec.turns else (row,)
        first, *then = (read(turn, i) for turn in turns)
        found.append(Question(first.prompt, expected=first.expected, follow_up=then[0] if then else None))
    return found


def _turns(row: Row, prompt: str, reference: str | None, number: int, source: str) -> tuple[Row, Row]:
    """Make a row of each turn; there may be a right answer to one of them, to both or to none."""
    found = (dict(row), dict(row))
    for column in (prompt, reference):
        value = None if column is None else row.get(column)
        if column is None or value is None:
            continue
        if not isinstance(value, list):
            raise DeltaguardError(
                f"Row {number} of {source} has a {type(value).__name__} in column `{column}`, where a list "
                "of turns belongs. Give the file as JSON, JSON lines or parquet: other forms hold no lists."
            )
        turns = cast("list[object]", value)
        if len(turns) > len(found) or (column == prompt and len(turns) < len(found)):
            raise DeltaguardError(
                f"Row {number} of {source} has {len(turns)} turn{'' if len(turns) == 1 else 's'} in column "
                f"`{column}`, and a conversation has two: correct the file, or leave out the row."
            )
        for each, text in zip_longest(found, turns):
            each[column] = text
    return found


def _own(rows: Sequence[Row], source: str) -> list[Question]:
    columns = _columns(rows)
    prompt = _first(columns, (ONLY_COLUMN,))
    system = _first(columns, ("system",))
    expected = _first(columns, ("expected", "response"))
    if prompt is None:
        raise DeltaguardError(
            f"{source} has the columns {_quoted(columns)}; a file of questions needs `prompt`, and may have "
            "`system` and `expected` (or `response`). Rename its columns; a file of a public data set is "
            f"read by giving the set's name too: {', '.join(DATASETS)}."
        )
    return [
        Question(
            _text(row, prompt, i, source),
            system=_optional(row, system, i, source),
            expected=_optional(row, expected, i, source),
        )
        for i, row in enumerate(rows, start=1)
    ]


def _columns(rows: Sequence[Row]) -> list[str]:
    """All columns of all rows, in the order of their first appearance: JSON rows may differ."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _first(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    by_name = {column.strip().casefold(): column for column in columns}
    return next((by_name[name] for name in wanted if name in by_name), None)


def _quoted(columns: Sequence[str], joint: str = ", ") -> str:
    return joint.join(f"`{column}`" for column in columns) or "(none)"


def _text(row: Row, column: str, number: int, source: str) -> str:
    text = _optional(row, column, number, source)
    if text is None or not text.strip():
        raise DeltaguardError(
            f"Row {number} of {source} has no text in column `{column}`: fill it or remove it."
        )
    return text


def _optional(row: Row, column: str | None, number: int, source: str) -> str | None:
    value = None if column is None else row.get(column)
    # Right answers may be written as plain numbers.
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DeltaguardError(
        f"Row {number} of {source} has a {type(value).__name__} in column `{column}`, where text belongs."
    )
