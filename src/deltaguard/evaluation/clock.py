"""How long the stages of an evaluation took, over all runs in its folder."""

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from deltaguard.files import read_json
from deltaguard.models.durable import write_atomically

_Seconds = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_SECONDS: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, _Seconds])


@dataclass(frozen=True)
class Clock:
    """Wall times by stage, kept in a file, so that a run that goes on adds to what was there.

    Attributes:
        path: the file; made when the first stage ends.
    """

    path: Path

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by stage so far.

        Raises:
            DeltaguardError: the file is not what this class writes.
        """
        if not self.path.exists():
            return {}
        remedy = "It holds how long the stages took so far: remove it, which loses nothing else."
        return read_json(self.path, _SECONDS, remedy=remedy)

    @contextmanager
    def timed(self, stage: str) -> Generator[None]:
        """Add the time of a block to a stage, also where the block fails; a kill loses it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            found = self.seconds
            found[stage] = found.get(stage, 0.0) + time.perf_counter() - started
            write_atomically(self.path, json.dumps(found, indent=1) + "\n")
