"""What a row of the results is, and what all rows are measured with."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Measurement, median_of, run_process


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        name: what was measured.
        seconds: wall time.
        peak_memory_bytes: largest resident set of the process, None where it says nothing.
        ratio: to what the note names, of the time unless the note says otherwise; None where that was not
            measured.
        note: what the ratio compares with, and how the row was measured.
    """

    name: str
    seconds: float
    peak_memory_bytes: int | None
    ratio: float | None
    note: str


class UnavailableError(RuntimeError):
    """A row cannot be measured here, for the reason given."""


@dataclass
class Bench:
    """Measures processes and makes rows of them; later rows are set in relation to earlier ones.

    Attributes:
        work: folder for inputs, which are kept, and outputs, which are not.
        runs: odd number of runs of which the median counts.
        full: whether to run slow solvers on all blocks instead of on some.
        rows: what was measured, by key.
    """

    work: Path
    runs: int
    full: bool
    rows: dict[str, Row] = field(default_factory=dict)

    def row(self, name: str, measured: Measurement, floor: str | None, *notes: str) -> Row:
        """Give a row that is compared with another one, the floor, given by its key."""
        parts = [self.compared(floor) if floor else "", *notes]
        ratio = self.ratio(measured.seconds, floor) if floor else None
        return Row(name, measured.seconds, measured.peak_memory_bytes, ratio, "; ".join(filter(None, parts)))

    def compared(self, floor: str) -> str:
        """Find the note that says what a ratio compares with."""
        return f"x {self.rows[floor].name}" if floor in self.rows else "compared with nothing"

    def ratio(self, seconds: float, floor: str) -> float | None:
        """Find the ratio to another row's time."""
        return seconds / self.rows[floor].seconds if floor in self.rows else None

    def measured(self, once: Callable[[], Measurement]) -> Measurement:
        """Find the median run, after one that is not counted: it reads its inputs into the page cache."""
        once()
        return median_of(self.runs, once)

    def fabricate(self, kind: str, folder: Path, *more: object) -> None:
        """Make inputs, where they are not there yet."""
        if not folder.exists():
            run_process([sys.executable, "-m", "benchmarks.fabricate", kind, folder, *map(str, more)])

    def restore(self, models: Path, *options: object, finetuned: Path | None = None) -> Measurement:
        """Run `deltaguard restore` on a folder's pair of models, or on another fine-tune of its first."""
        verb = [sys.executable, "-m", "deltaguard", "restore"]
        pair = [models / "aligned", finetuned or models / "finetuned"]
        command = [*verb, *pair, "-o", self.output(), "--json"]
        return run_process([*command, *map(str, options)])

    def output(self) -> Path:
        """Give a folder that does not exist yet."""
        shutil.rmtree(self.work / "output", ignore_errors=True)
        return self.work / "output"
