"""What a paid or slow judge already said, kept in a file that a kill cannot spoil."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from deltaguard.errors import DeltaguardError


@dataclass
class ScoreCache:
    """Scores by key, read once and appended to, one JSON line a score.

    Attributes:
        path: the file; made on the first score. `None` keeps the scores in memory alone.
    """

    path: Path | None
    _scores: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._scores = {} if self.path is None or not self.path.exists() else _read(self.path)

    def get(self, key: str) -> int | None:
        """The score, `None` where there is none."""
        return self._scores.get(key)

    def put(self, key: str, score: int) -> None:
        """Keep a score; it is on the disk when this returns."""
        self._scores[key] = score
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "score": score}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _read(path: Path) -> dict[str, int]:
    """The scores of whole lines; a last line that a kill cut short is removed from the file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["key"]: int(row["score"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaguardError(
            f"The judge's cache {path} holds a line that is no score ({error}). Delete the file, or name "
            "another."
        ) from error
