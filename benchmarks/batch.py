"""What restoring many fine-tunes together is worth: `python -m benchmarks.batch ALIGNED STORE FINETUNED ...`.

The same fine-tunes are restored by one command, and by one command each; both start with no answers of the
aligned model kept, and with all files in the page cache. Options of `deltaguard restore` follow a `--`. The
weights of both must be the same, byte for byte. Prints one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.measure import Measurement, run_process, warm


@dataclass(frozen=True)
class Throughput:
    """Seconds of both ways, in the same run.

    Attributes:
        finetunes: how many were restored.
        separate_seconds: of a command each, all together.
        together_seconds: of one command.
        ratio: fine-tunes in a time by one command to those by a command each, the median over runs.
        separate_peak_bytes: largest resident set of any of these commands.
        together_peak_bytes: of the one command.
    """

    finetunes: int
    separate_seconds: list[float]
    together_seconds: list[float]
    ratio: float
    separate_peak_bytes: int
    together_peak_bytes: int


@dataclass(frozen=True)
class Batch:
    """Measures both ways.

    Attributes:
        aligned: the aligned model.
        store: its curvature.
        finetuned: the fine-tunes, of different names.
        options: of every restore.
    """

    aligned: Path
    store: Path
    finetuned: Sequence[Path]
    options: Sequence[str]

    def measured(self, runs: int) -> Throughput:
        """Restore in both ways, so often."""
        warm(self.aligned, self.store, *self.finetuned)
        pairs = [self._both() for _ in range(runs)]
        separate = [sum(each.seconds for each in apart) for apart, _ in pairs]
        together = [whole.seconds for _, whole in pairs]
        return Throughput(
            finetunes=len(self.finetuned),
            separate_seconds=separate,
            together_seconds=together,
            ratio=median(one / other for one, other in zip(separate, together, strict=True)),
            separate_peak_bytes=max(each.peak_memory_bytes for apart, _ in pairs for each in apart),
            together_peak_bytes=max(whole.peak_memory_bytes for _, whole in pairs),
        )

    def _both(self) -> tuple[list[Measurement], Measurement]:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            names = [path.name for path in self.finetuned]
            apart = [
                self._restore(folder / "cache-apart", [path], folder / "apart" / path.name)
                for path in self.finetuned
            ]
            whole = self._restore(folder / "cache-together", self.finetuned, folder / "together")
            for name in names:
                for file in sorted((folder / "apart" / name).glob("*.safetensors")):
                    assert file.read_bytes() == (folder / "together" / name / file.name).read_bytes(), name
        return apart, whole

    def _restore(self, cache: Path, finetuned: Sequence[Path], output: Path) -> Measurement:
        verb = [sys.executable, "-m", "deltaguard", "restore"]
        command = [*verb, self.aligned, *finetuned, "-o", output, "--store", self.store, "--json"]
        return run_process([*command, *self.options], environment={"DELTAGUARD_CACHE": str(cache)})


def main() -> None:
    """Measure, and print."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("aligned", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("finetuned", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args(given[:end])
    if len(options.finetuned) < 2:
        parser.error("one fine-tune is no batch")
    batch = Batch(options.aligned, options.store, options.finetuned, given[end + 1 :])
    print(json.dumps(vars(batch.measured(options.runs)), indent=1))


if __name__ == "__main__":
    main()
