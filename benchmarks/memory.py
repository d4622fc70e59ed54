"""Memory against depth, shards and conversations, and time against width: `python -m benchmarks.memory`.

Every number is of a process of its own, on random Llama-shaped models that are made and removed on the way
(3 GB at a time). Writes `docs/results/memory.json`; about ten minutes on two cores.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.scaling import Scaling, ScalingRow

from benchmarks.layout import Shape
from benchmarks.measure import Measurement, program, run_process, warm

RESULT = Path(__file__).parents[1] / "docs" / "results" / "memory.json"
DEPTH = Shape(hidden=512, intermediate=1408, blocks=8, heads=8, kv_heads=4, vocabulary=4096)
BLOCKS, SHARDS, CONVERSATIONS, WIDTHS = (8, 16, 32), (4, 8, 16), (16, 64, 256), (512, 1024, 2048, 4096)
_STARTS = 1.5
"""A run tells of its work where it takes more than so many starts."""
FEW = 16
"""Conversations where their number is not what changes."""


@dataclass
class Scales:
    """Measures how memory and time grow.

    Attributes:
        work: a folder for models, which are removed after use.
        rows: what was measured.
    """

    work: Path
    rows: list[ScalingRow]

    def measure(self) -> None:
        """Measure all."""
        for blocks in BLOCKS:
            self._calibrate("decoder blocks", blocks, replace(DEPTH, blocks=blocks), FEW)
        for shards in SHARDS:
            self._restore("shards", shards, replace(DEPTH, blocks=2 * shards, shards=shards))
        for conversations in CONVERSATIONS:
            self._calibrate("conversations", conversations, DEPTH, conversations)
        for width in WIDTHS:
            shape = replace(DEPTH, hidden=width, intermediate=width * 11 // 4, blocks=2, shards=1)
            self._calibrate("width", width, shape, FEW)
            self._restore("width", width, shape)

    def _calibrate(self, against: str, value: int, shape: Shape, conversations: int) -> None:
        """Calibrate block by block on answers that are given: the model is not loaded to make them."""
        folder = self._made(shape)
        found = program("calibrate-blocks", folder / "aligned", self.work / "out", conversations)
        self._add("calibrate", against, value, found)

    def _restore(self, against: str, value: int, shape: Shape) -> None:
        """Restore at a strength, nothing kept in memory between finding the price and writing."""
        folder = self._made(shape)
        program("store", folder, json.dumps(vars(shape)))
        verb = [sys.executable, "-m", "deltaguard", "restore", folder / "aligned", folder / "finetuned"]
        options = ["-o", self.work / "out", "--store", folder / "store", "--memory", "0", "--device", "cpu"]
        warm(folder)
        self._add("restore", against, value, run_process([*verb, *options, "--strength", "0.01", "--json"]))

    def _made(self, shape: Shape) -> Path:
        for folder in (self.work / "models", self.work / "out"):
            shutil.rmtree(folder, ignore_errors=True)
        program("models", self.work / "models", json.dumps(vars(shape)))
        return self.work / "models"

    def _add(self, what: str, against: str, value: int, found: Measurement) -> None:
        row = ScalingRow(
            what=what,
            against=against,
            value=value,
            seconds=found.seconds,
            peak_memory_bytes=found.peak_memory_bytes,
        )
        print(f"{what}, {value} {against}: {found.seconds:.1f} s, {found.peak_memory_bytes / 1e9:.2f} GB")
        self.rows.append(row)


def exponent(rows: Sequence[ScalingRow], base: float) -> float | None:
    """Fit the power of the width that time grows with: the slope over logarithms, by least squares.

    Runs that take less than half as long again as their imports say nothing of it, and are left out.

    Args:
        rows: of several widths; where fewer than two take longer, the result is None.
        base: seconds that every run takes for itself.

    Example:
        >>> row = ScalingRow(what="", against="width", value=1, seconds=3.0, peak_memory_bytes=1)
        >>> rows = [row, row.model_copy(update={"value": 2, "seconds": 6.0})]
        >>> round(exponent(rows, base=2.0), 6)
        2.0
    """
    points = [(log(row.value), log(row.seconds - base)) for row in rows if row.seconds > _STARTS * base]
    if len(points) < 2:
        return None
    x, y = (sum(each) / len(points) for each in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    output = parser.parse_args().output
    with TemporaryDirectory() as folder:
        scales = Scales(Path(folder), [])
        scales.measure()
    base = program("imports").seconds
    widths = [row for row in scales.rows if row.against == "width"]
    exponents = {
        what: exponent([row for row in widths if row.what == what], base) for what in ("calibrate", "restore")
    }
    environment = json.loads(program("environment").output)
    result = Scaling(
        environment=environment, seed=0, base_seconds=base, rows=tuple(scales.rows), exponents=exponents
    )
    output.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(f"Written to {output}")


if __name__ == "__main__":
    main()
