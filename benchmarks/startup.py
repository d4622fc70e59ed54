"""How long a user waits for nothing: the package's import and the program's help."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.measure import run_process
from benchmarks.rows import Bench, Row


@dataclass
class Startup:
    """Measures the rows.

    Attributes:
        bench: what they are measured with.
    """

    bench: Bench

    @property
    def benchmarks(self) -> Mapping[str, Callable[[], Row]]:
        """The rows, in the order in which they need each other."""
        return {
            "python": lambda: self._row("`python -c pass`", None, "-c", "pass"),
            "import": lambda: self._row("`import deltaguard`", "python", "-c", "import deltaguard"),
            "help": lambda: self._row("`deltaguard --help`", "python", "-m", "deltaguard", "--help"),
        }

    def prepare(self) -> None:
        """Make nothing: there are no inputs."""

    def _row(self, name: str, floor: str | None, *arguments: str) -> Row:
        measured = self.bench.measured(lambda: run_process([sys.executable, *arguments]))
        return self.bench.row(name, measured, floor)
