"""Run one process and read from the operating system what it took."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Measurement:
    """What a process took, as a whole: interpreter start and imports are part of it.

    Attributes:
        seconds: wall time from its start to its end.
        peak_memory_bytes: its largest resident set, pages of mapped files included.
        output: what it printed on stdout.
        flush_seconds: what it then took to bring to disk what the process had left to the page cache.
    """

    seconds: float
    peak_memory_bytes: int
    output: str
    flush_seconds: float


class ProcessFailedError(RuntimeError):
    """A measured process failed."""


def run_process(
    command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None
) -> Measurement:
    """Run a command to its end.

    The caller must be small: a process starts with the resident set of the one that it is forked from.

    Args:
        command: the program and its arguments.
        environment: variables that are set for it besides the inherited ones.

    Raises:
        ProcessFailedError: it ended with another status than 0; the end of what it printed is told.
    """
    os.sync()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=errors,
            env=os.environ | dict(environment or {}),
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        os.sync()
        flushed = time.perf_counter() - started - seconds
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            told = errors.read().decode(errors="replace")[-2000:]
            raise ProcessFailedError(f"{command[0]} ended with status {process.returncode}:\n{told}")
        return Measurement(seconds, _bytes(usage.ru_maxrss), output.read().decode(), flushed)


def program(name: str, *arguments: object) -> Measurement:
    """Run one of `benchmarks.programs` in a process of its own."""
    return run_process([sys.executable, "-m", "benchmarks.programs", name, *map(str, arguments)])


def median_of(runs: int, once: Callable[[], Measurement]) -> Measurement:
    """Find the run of median wall time, of an odd number of runs."""
    assert runs % 2, "the median of an even number of runs is no run"
    measured = sorted((once() for _ in range(runs)), key=lambda one: one.seconds)
    return measured[statistics.median_low(range(runs))]


def warm(*folders: Path) -> None:
    """Read every file of some folders once, so that they lie in the page cache."""
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass


def _bytes(maximal_resident_set: int) -> int:
    return maximal_resident_set if sys.platform == "darwin" else maximal_resident_set * 1024
