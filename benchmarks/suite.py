"""What is measured: one method a row. A row's ratio compares it with what its note names."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

from benchmarks.measure import program
from benchmarks.rows import Bench, Row, UnavailableError
from benchmarks.smollm2 import SmolLM2
from benchmarks.startup import Startup
from benchmarks.synthetic import Synthetic


class Suite(Bench):
    """All rows."""

    @cached_property
    def _parts(self) -> tuple[Startup, Synthetic, SmolLM2]:
        return Startup(self), Synthetic(self), SmolLM2(self)

    @property
    def benchmarks(self) -> Mapping[str, Callable[[], Row]]:
        """The rows that can be measured, in the order in which they need each other."""
        return {name: row for part in self._parts for name, row in part.benchmarks.items()}

    def prepare(self, names: Collection[str]) -> None:
        """Make the inputs of some rows, where they are not there yet."""
        self.work.mkdir(parents=True, exist_ok=True)
        for part in self._parts:
            if not part.benchmarks.keys().isdisjoint(names):
                part.prepare()

    def environment(self) -> dict[str, Any]:
        """Versions and machine."""
        return json.loads(program("environment").output)


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
