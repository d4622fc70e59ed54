"""What a run that writes a checkpoint has finished, on disk, so that it can go on after it was killed."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError


@dataclass(frozen=True)
class FileRecord:
    """One finished file.

    Attributes:
        name: its path within the output folder.
        bytes: its size.
        sha256: the hash of its content, 64 hexadecimal digits.
        notes: what the caller wanted to know about it after a restart; anything that JSON can hold.
    """

    name: str
    bytes: int
    sha256: str
    notes: Any = None


class Journal:
    """Progress of one run as JSON lines, each on disk before the method that adds it returns.

    The first line says what run it is; the others record a finished file, a file that is being written
    anew, something found out, or the beginning of the commit.

    Attributes:
        plan_hash: identifies what the run writes.
        overwrite: whether it may replace a checkpoint.
        records: finished files by name.
        committing: whether files have begun to move into the output folder.
        remembered: what the run found out and must not find out again.
    """

    def __init__(self, path: Path, *, plan_hash: str, overwrite: bool) -> None:
        self.plan_hash = plan_hash
        self.overwrite = overwrite
        self.records: dict[str, FileRecord] = {}
        self.committing = False
        self.remembered: dict[str, Any] = {}
        self._path = path

    @classmethod
    def create(cls, path: Path, *, plan_hash: str, overwrite: bool) -> "Journal":
        """A new journal at `path`, replacing any that is there."""
        path.unlink(missing_ok=True)
        journal = cls(path, plan_hash=plan_hash, overwrite=overwrite)
        journal._append({"plan_hash": plan_hash, "overwrite": overwrite})
        return journal

    @classmethod
    def load(cls, path: Path) -> "Journal | None":
        """The journal at `path`, or None if there is none or it was never begun.

        A last line that was cut off by a kill is dropped, from the file too.

        Raises:
            DeltaguardError: another line cannot be read.
        """
        if not path.exists():
            return None
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        os.truncate(path, len(complete))
        if not complete:
            return None
        try:
            events = [json.loads(line) for line in complete.splitlines()]
            journal = cls(path, plan_hash=events[0]["plan_hash"], overwrite=events[0]["overwrite"])
            for event in events[1:]:
                journal._apply(event)
        except (ValueError, KeyError, TypeError) as error:
            raise DeltaguardError(
                f"The progress in {path} cannot be read ({error!r}): start again with --overwrite."
            ) from error
        return journal

    def finish(self, record: FileRecord) -> None:
        """Record a file that lies complete in the staging folder."""
        self._append({"finished": asdict(record)})

    def begin(self, name: str) -> None:
        """Forget a finished file, because it is about to be written anew."""
        if name in self.records:
            self._append({"begun": name})

    def remember(self, name: str, value: Any) -> None:
        """Record something that JSON can hold."""
        self._append({"remembered": {name: value}})

    def commit(self) -> None:
        """Record that files begin to move into the output folder."""
        self._append({"committing": True})

    def _append(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(line)
                os.fsync(file.fileno())
        except OSError:
            # Half a line, on a full disk, would spoil the next one.
            os.truncate(self._path, size)
            raise
        self._apply(event)

    def _apply(self, event: Mapping[str, Any]) -> None:
        if "finished" in event:
            record = FileRecord(**event["finished"])
            self.records[record.name] = record
        elif "begun" in event:
            self.records.pop(event["begun"], None)
        elif "remembered" in event:
            self.remembered |= event["remembered"]
        elif "committing" in event:
            self.committing = True
