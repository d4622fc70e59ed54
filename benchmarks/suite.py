"""What is measured: one method a row. A row's ratio compares it with what its note names."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.layout import BLOCKS, greedy_operations
from benchmarks.measure import Measurement, median_of, run_process, warm
from benchmarks.merge_tool import install

PUBLISHED_BLOCKS = 2
FACTORISED_BLOCKS = 2
CONVERSATIONS = 128


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        name: what was measured.
        seconds: wall time.
        peak_memory_bytes: largest resident set of the process, None where it says nothing.
        ratio: of the time, to the time of what the note names; None where that was not measured.
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
class Suite:
    """Measures rows one by one; later ones are set in relation to earlier ones.

    Attributes:
        work: folder for inputs, which are kept, and outputs, which are not.
        runs: odd number of runs of which the median counts.
        full: whether to run slow solvers on all blocks instead of on some.
        rows: what was measured, by key.
        operations: floating-point operations that `greedy` needs on the whole synthetic model.
        rate: floating-point operations per second of a large matrix product.
    """

    work: Path
    runs: int
    full: bool
    rows: dict[str, Row] = field(default_factory=dict)
    operations: float | None = None
    rate: float | None = None

    @property
    def pair(self) -> Path:
        """Where the synthetic pair and its store lie."""
        return self.work / "pair"

    @property
    def benchmarks(self) -> Mapping[str, Callable[[], Row]]:
        """The rows that can be measured, in the order in which they need each other."""
        return {
            "copy": self.copy,
            "interpolate": self.interpolate,
            "mergekit": self.mergekit,
            "greedy": self.greedy,
            "gemm": self.gemm,
            "work": self.floating_point_work,
            "solve-greedy": self.solve_greedy,
            "solve-published": self.solve_published,
            "factorise": self.factorise,
            "calibrate-smollm2": self.calibrate_smollm2,
            "restore-smollm2": self.restore_smollm2,
        }

    def prepare(self) -> None:
        """Make the inputs, where they are not there yet, and read them into the page cache."""
        self.work.mkdir(parents=True, exist_ok=True)
        for kind in ("pair", "smollm2"):
            if not (self.work / kind).exists():
                run_process([sys.executable, "-m", "benchmarks.fabricate", kind, self.work / kind])
        warm(self.pair)

    def copy(self) -> Row:
        """The floor: the same bytes read and written."""
        copied = self._measured(lambda: self._program("copy", self.pair, self._output()))
        return self._row("Copy: read both models, write one", copied, None, "the floor")

    def interpolate(self) -> Row:
        """Restore without curvature."""
        options = ("--method", "interpolate", "--strength", "0.5")
        measured = self._measured(lambda: self._restore(self.pair, *options))
        return self._row("`restore --method interpolate`", measured, "copy")

    def mergekit(self) -> Row:
        """The same interpolation by mergekit."""
        tool = install(self.work / "mergekit")
        if isinstance(tool, str):
            raise UnavailableError(tool)
        measured = self._measured(lambda: run_process(tool.command(self.pair, self._output())))
        note = f"it leaves its output to the page cache: {measured.flush_seconds:.1f} s more to flush it"
        return self._row("mergekit, linear merge", measured, "copy", note)

    def greedy(self) -> Row:
        """Restore with the factors of a store."""
        measured = self._measured(lambda: self._restore(self.pair, "--store", str(self.pair / "store")))
        layers: list[dict[str, Any]] = json.loads(measured.output)["layers"]
        self.operations = sum(greedy_operations(row["shape"], row["kept_fraction"]) for row in layers)
        return self._row("`restore --method greedy`", measured, "copy", "with the factors of a store")

    def gemm(self) -> Row:
        """The rate of the machine's matrix products."""
        measured = self._program("gemm")
        found = json.loads(measured.output)
        self.rate = found["rate"]
        note = f"float32, 4096 x 4096; {found['rate'] / 1e9:.0f} billion operations per second"
        return Row("Matrix product", found["seconds"], None, None, note)

    def floating_point_work(self) -> Row:
        """How long the operations of `greedy` would take at the rate of matrix products."""
        if self.operations is None or self.rate is None:
            raise UnavailableError("it needs the rows `greedy` and `gemm`")
        note = f"{self.operations / 1e12:.2f} trillion operations, counted from shapes, at that rate"
        return Row("Floating-point work of `greedy`", self.operations / self.rate, None, None, note)

    def solve_greedy(self) -> Row:
        """The solver alone."""
        return self._solver("greedy", "Solving alone, `greedy`", "work", BLOCKS)

    def solve_published(self) -> Row:
        """The slow solver alone, on some blocks."""
        return self._solver("published", "Solving alone, `published`", "solve-greedy", PUBLISHED_BLOCKS)

    def factorise(self) -> Row:
        """What a store saves: the factors are made once for an aligned model."""
        return self._solver(
            "factorise", "Factorising, once per aligned model", "solve-greedy", FACTORISED_BLOCKS
        )

    def calibrate_smollm2(self) -> Row:
        """Calibration of a real, small model."""
        store = self.work / "smollm2-store"
        shutil.rmtree(store, ignore_errors=True)
        number = str(CONVERSATIONS)
        command = self._deltaguard("calibrate", self.work / "smollm2" / "aligned", "-o", store)
        measured = run_process([*command, "--num-samples", number])
        name = "SmolLM2-135M: `calibrate`"
        return self._row(name, measured, None, f"{number} conversations, answered by the model; one run")

    def restore_smollm2(self) -> Row:
        """Restore of a real, small model."""
        store = self.work / "smollm2-store"
        if not store.exists():
            raise UnavailableError("it needs the row `calibrate-smollm2`")
        warm(self.work / "smollm2", store)
        measured = self._measured(lambda: self._restore(self.work / "smollm2", "--store", str(store)))
        return self._row("SmolLM2-135M: `restore`", measured, None, "float32; with the factors of the store")

    def environment(self) -> dict[str, Any]:
        """Versions and machine."""
        return json.loads(self._program("environment").output)

    def _solver(self, program: str, name: str, floor: str, blocks: int) -> Row:
        solved = BLOCKS if self.full else blocks
        measured = self._program(program, self.pair, solved)
        seconds = json.loads(measured.output)["seconds"] * BLOCKS / solved
        how = f"{solved} of {BLOCKS} blocks, scaled" if solved < BLOCKS else "all blocks"
        note = f"{self._compared(floor)}; {how}, without reading; one run"
        return Row(name, seconds, measured.peak_memory_bytes, self._ratio(seconds, floor), note)

    def _measured(self, once: Callable[[], Measurement]) -> Measurement:
        """The median run, after one that is not counted."""
        once()
        return median_of(self.runs, once)

    def _row(self, name: str, measured: Measurement, floor: str | None, note: str = "") -> Row:
        parts = [part for part in (self._compared(floor) if floor else "", note) if part]
        ratio = self._ratio(measured.seconds, floor) if floor else None
        return Row(name, measured.seconds, measured.peak_memory_bytes, ratio, "; ".join(parts))

    def _compared(self, floor: str) -> str:
        return f"x {self.rows[floor].name}" if floor in self.rows else "compared with nothing"

    def _ratio(self, seconds: float, floor: str) -> float | None:
        return seconds / self.rows[floor].seconds if floor in self.rows else None

    def _output(self) -> Path:
        """A folder that does not exist yet."""
        shutil.rmtree(self.work / "output", ignore_errors=True)
        return self.work / "output"

    def _program(self, name: str, *arguments: object) -> Measurement:
        return run_process([sys.executable, "-m", "benchmarks.programs", name, *map(str, arguments)])

    def _restore(self, models: Path, *options: str) -> Measurement:
        command = self._deltaguard("restore", models / "aligned", models / "finetuned", "-o", self._output())
        return run_process([*command, *options])

    def _deltaguard(self, verb: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "deltaguard", verb, *map(str, arguments), "--json"]


def measure(suite: Suite, names: list[str], tell: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Measure rows into `suite.rows`.

    Args:
        suite: what to measure with.
        names: keys of `suite.benchmarks`.
        tell: told the name of what is measured next.

    Yields:
        Name and reason of each row that cannot be measured.
    """
    for name in names:
        tell(name)
        try:
            suite.rows[name] = suite.benchmarks[name]()
        except UnavailableError as error:
            yield name, str(error)
