"""What a run that writes a checkpoint has finished, on disk, so that it can go on after it was killed."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import append_journal, problems, read_file, read_journal
from deltaguard.models.durable import write_atomically
from deltaguard.models.names import name_problem

JOURNAL_NAME = "journal.jsonl"
"""The file in the staging folder that holds the journal."""

_BESIDE = "journal-{number}.jsonl"
"""Where another process of the same run records what it has finished."""

_START_ANEW = (
    "Start anew with --overwrite and without --resume: what was staged is given up, and other files stay."
)

T = TypeVar("T")


def _checked(name: str) -> str:
    problem = name_problem(name)
    if problem:
        raise ValueError(problem)
    return name


_Name = Annotated[str, AfterValidator(_checked)]


@dataclass(frozen=True)
class FileRecord:
    """One finished file.

    Attributes:
        name: its path within the output folder.
        bytes: its size.
        sha256: the hash of its content, 64 hexadecimal digits.
        notes: what the caller wanted to know about it after a restart; anything that JSON can hold.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    name: _Name
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    notes: Any = None


class _Event(BaseModel):
    """A line of the journal, which records exactly one thing; `replaces` belongs to `plan_hash`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    plan_hash: str | None = None
    replaces: tuple[_Name, ...] | None = None
    finished: FileRecord | None = None
    begun: _Name | None = None
    remembered: dict[str, JsonValue] | None = None
    committing: Literal[True] | None = None

    @model_validator(mode="after")
    def _records_one_thing(self) -> Self:
        kinds = self.model_fields_set - {"replaces"}
        begins = self.plan_hash is not None
        if (
            len(kinds) != 1
            or any(getattr(self, kind) is None for kind in kinds)
            or begins != ("replaces" in self.model_fields_set)
        ):
            raise ValueError("this is no line of a run's progress")
        return self

    def line(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class Journal:
    """Progress of one run as JSON lines, each on disk before the method that adds it returns.

    The first line says what run it is and what it may replace; the others record a finished file, a file that
    is being written anew, something found out, or the beginning of the commit. Where several processes write
    files of a run, each of the others keeps a journal of its own beside this one: appending to one file from
    several machines spoils it. The next run takes over what they hold.

    Attributes:
        plan_hash: identifies what the run writes.
        replaces: files in the output folder that the run may replace or remove; None where it was begun in an
            empty folder and may replace nothing.
        records: finished files by name.
        moved: files that may have been moved into the output folder: those finished when the commit began.
        committing: whether files have begun to move into the output folder.
    """

    def __init__(self, path: Path, *, plan_hash: str, replaces: Collection[str] | None) -> None:
        self.plan_hash = plan_hash
        self.replaces = None if replaces is None else frozenset(replaces)
        self.records: dict[str, FileRecord] = {}
        self.moved: frozenset[str] = frozenset()
        self.committing = False
        self._path = path
        self._remembered: dict[str, Any] = {}
        self._beside: dict[str, FileRecord] = {}
        self._is_on_disk = True

    @classmethod
    def create(cls, path: Path, *, plan_hash: str, replaces: Collection[str] | None) -> "Journal":
        """Begin a journal, in the place of any that is there and that is lost only when this one is whole."""
        for other in _journals_beside(path):
            other.unlink()
        known = None if replaces is None else tuple(sorted(replaces))
        write_atomically(path, _Event(plan_hash=plan_hash, replaces=known).line() + "\n")
        return cls(path, plan_hash=plan_hash, replaces=replaces)

    @classmethod
    def beside(cls, folder: Path, number: int, *, plan_hash: str) -> "Journal":
        """Begin the journal of a process that writes files for another; on disk with the first of them.

        Args:
            folder: where the other's journal lies.
            number: of the process, not 0.
            plan_hash: that of the other's journal.
        """
        journal = cls(folder / _BESIDE.format(number=number), plan_hash=plan_hash, replaces=None)
        journal._is_on_disk = False
        return journal

    @classmethod
    def load(cls, path: Path) -> "Journal | None":
        """Read the journal of a run that was interrupted; None if there is none or it was never begun.

        A last line that was cut off by a kill is dropped, from the file too.

        Raises:
            DeltaguardError: another line is damaged: what, and how to start anew.
        """
        # Killed while the first line was written: a new run writes the file anew.
        if path.is_file() and not path.is_symlink() and b"\n" not in read_file(path):
            return None
        events = read_journal(path, _Event, remedy=_START_ANEW)
        if not events:
            return None
        started = events[0]
        starts = [n for n, event in enumerate(events, start=1) if event.plan_hash is not None]
        if started.plan_hash is None or len(starts) > 1:
            wrong = 1 if started.plan_hash is None else starts[1]
            raise DeltaguardError(
                f"{path} cannot be used: line {wrong}: a run begins in the first line, and nowhere else\n"
                f"{_START_ANEW}"
            )
        journal = cls(path, plan_hash=started.plan_hash, replaces=started.replaces)
        for event in events[1:]:
            journal._apply(event)
        return journal

    def take_over(self) -> None:
        """Know of the files that other processes of the interrupted run finished; nothing is changed on disk.

        Raises:
            DeltaguardError: a journal of theirs is damaged, or that of another run.
        """
        if self.committing:
            # All that others wrote was recorded here before.
            return
        for path in _journals_beside(self._path):
            other = Journal.load(path)
            if other is not None and other.plan_hash != self.plan_hash:
                wrong = [f"it is of the plan {other.plan_hash}, and {self._path.name} of {self.plan_hash}"]
                raise other.refusal("it is no progress of this run", wrong)
            self._beside |= other.records if other is not None else {}
        self.records |= self._beside

    def settle(self) -> None:
        """Record here what was taken over, and remove the journals of other processes."""
        for record in self._beside.values():
            self.finish(record)
        self._beside = {}
        for path in _journals_beside(self._path):
            path.unlink()

    @property
    def is_alone(self) -> bool:
        """Whether no other process of the run has recorded a finished file."""
        return not _journals_beside(self._path)

    @property
    def has_found_out(self) -> bool:
        """Whether anything is remembered."""
        return bool(self._remembered)

    def finish(self, record: FileRecord) -> None:
        """Record a file that lies complete in the staging folder."""
        self._append(_Event(finished=record))

    def begin(self, name: str) -> None:
        """Forget a finished file, because it is about to be written anew."""
        if name in self.records:
            self._append(_Event(begun=name))

    def remember(self, name: str, value: Any) -> None:
        """Record something that JSON can hold."""
        self._append(_Event(remembered={name: value}))

    def remembered(self, name: str, schema: TypeAdapter[T]) -> T | None:
        """Tell what was recorded under a name, None where nothing was.

        Raises:
            DeltaguardError: it is not what the schema describes.
        """
        value = self._remembered.get(name)
        return None if value is None else self._validated(value, schema, f"what was remembered as {name}")

    def notes(self, record: FileRecord, schema: TypeAdapter[T]) -> T:
        """Tell what was noted about a finished file.

        Raises:
            DeltaguardError: it is not what the schema describes.
        """
        return self._validated(record.notes, schema, f"what was noted about {record.name}")

    def commit(self) -> None:
        """Record that files begin to move into the output folder."""
        self._append(_Event(committing=True))

    def refusal(self, what: str, wrong: list[str]) -> DeltaguardError:
        """Make the error that says what in this journal is damaged, and how to start anew."""
        return DeltaguardError(f"{listed(f'{self._path} cannot be used: {what}', wrong)}\n{_START_ANEW}")

    def _validated(self, value: Any, schema: TypeAdapter[T], what: str) -> T:
        try:
            found = schema.validate_python(value)
            # JSON as Python reads it may hold numbers that no report can: infinity is null there.
            if schema.validate_json(schema.dump_json(found)) != found:
                raise self.refusal(what, ["it holds a number that is not finite"])
        except ValidationError as error:
            raise self.refusal(what, problems(error)) from error
        return found

    def _append(self, event: _Event) -> None:
        if not self._is_on_disk:
            write_atomically(self._path, _Event(plan_hash=self.plan_hash, replaces=None).line() + "\n")
            self._is_on_disk = True
        append_journal(self._path, event.line())
        self._apply(event)

    def _apply(self, event: _Event) -> None:
        if event.finished:
            self.records[event.finished.name] = event.finished
        elif event.begun:
            self.records.pop(event.begun, None)
        elif event.remembered:
            self._remembered |= event.remembered
        elif event.committing:
            self.committing = True
            self.moved |= self.records.keys()


def _journals_beside(path: Path) -> list[Path]:
    """Find the journals of other processes of a run."""
    return sorted(path.parent.glob(_BESIDE.format(number="*")))
