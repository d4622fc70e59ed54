"""What the project promises about its speed, and whether a run kept it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.suite import Row

SPEED_UP = 10.0
OVERHEAD = 1.5


@dataclass(frozen=True)
class Target:
    """A promise, and what was measured about it.

    Attributes:
        name: the promise.
        measured: the numbers.
        met: whether they keep it.
    """

    name: str
    measured: str
    met: bool


def check(rows: Mapping[str, Row]) -> list[Target]:
    """The targets whose rows were all measured."""
    return [target(rows) for needed, target in _TARGETS if needed <= rows.keys()]


def _solver(rows: Mapping[str, Row]) -> Target:
    ratio = rows["solve-published"].seconds / rows["solve-greedy"].seconds
    name = f"`greedy` solves at least {SPEED_UP:g} times faster than `published`"
    return Target(name, f"{ratio:.1f} times", ratio >= SPEED_UP)


def _faster_than_mergekit(rows: Mapping[str, Row]) -> Target:
    ours, theirs = rows["interpolate"].seconds, rows["mergekit"].seconds
    return Target(
        "`restore --method interpolate` is faster than mergekit",
        f"{ours:.1f} s, {theirs:.1f} s",
        ours < theirs,
    )


def _smaller_than_mergekit(rows: Mapping[str, Row]) -> Target:
    ours, theirs = rows["interpolate"].peak_memory_bytes or 0, rows["mergekit"].peak_memory_bytes or 0
    measured = f"{ours / 1e9:.2f} GB, {theirs / 1e9:.2f} GB"
    return Target("`restore --method interpolate` takes less memory than mergekit", measured, ours < theirs)


def _overhead(rows: Mapping[str, Row]) -> Target:
    bound = rows["interpolate"].seconds + rows["work"].seconds
    ratio = rows["greedy"].seconds / bound
    name = f"`restore --method greedy` takes at most {OVERHEAD:g} times interpolation plus its arithmetic"
    return Target(name, f"{rows['greedy'].seconds:.1f} s, {ratio:.2f} times {bound:.1f} s", ratio <= OVERHEAD)


_TARGETS: tuple[tuple[set[str], Callable[[Mapping[str, Row]], Target]], ...] = (
    ({"solve-greedy", "solve-published"}, _solver),
    ({"interpolate", "mergekit"}, _faster_than_mergekit),
    ({"interpolate", "mergekit"}, _smaller_than_mergekit),
    ({"interpolate", "work", "greedy"}, _overhead),
)
