"""What a paid or slow judge already said, kept in a file that a kill cannot spoil."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from deltaguard.files import read_journal
from deltaguard.models.durable import explained


class _Score(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    key: str
    score: int = Field(ge=1, le=5)


@dataclass
class ScoreCache:
    """Scores by key, read once and appended to, one JSON line a score.

    Attributes:
        path: the file; made on the first score. `None` keeps the scores in memory alone.

    Raises:
        DeltaguardError: the file cannot be read, or holds something else.
    """

    path: Path | None
    _scores: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        remedy = "Remove the file, or name another as the judge's cache: it is then asked again."
        rows = [] if self.path is None else read_journal(self.path, _Score, remedy=remedy)
        # Of two evaluations that share a file, both may have asked.
        self._scores = {row.key: row.score for row in rows}

    def get(self, key: str) -> int | None:
        """Look a score up, `None` where there is none."""
        return self._scores.get(key)

    def put(self, key: str, score: int) -> None:
        """Keep a score; it is on the disk when this returns."""
        self._scores[key] = score
        if self.path is None:
            return
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "score": score}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
