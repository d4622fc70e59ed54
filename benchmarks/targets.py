"""What the project promises about its speed, and whether a run kept it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.rows import Row

SPEED_UP = 10.0
OVERHEAD = 1.5
KFAC_TO_FLOOR = 1.3
INTERPOLATE_TO_COPY = 1.5
KFAC_TO_GREEDY = 2.0
STORE_SHARE = 0.25
CALIBRATION_TO_INPUTS = 4.0
IMPORT_SECONDS = 0.2
HELP_SECONDS = 0.7


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
    """Find the targets whose rows were all measured."""
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


def _floor(row: str, floor: str, most: float) -> Callable[[Mapping[str, Row]], Target]:
    def target(rows: Mapping[str, Row]) -> Target:
        ratio = rows[row].seconds / rows[floor].seconds
        name = f"{rows[row].name} takes at most {most:g} times its floor"
        return Target(name, f"{rows[row].seconds:.1f} s, {ratio:.2f} times", ratio <= most)

    return target


def _kfac(rows: Mapping[str, Row]) -> Target:
    ratio = rows["solve-kfac"].seconds / rows["solve-greedy"].seconds
    name = f"`kfac` solves in at most {KFAC_TO_GREEDY:g} times the time of `greedy`"
    return Target(name, f"{ratio:.2f} times", ratio <= KFAC_TO_GREEDY)


def _store(rows: Mapping[str, Row]) -> Target:
    share = rows["store"].ratio or 0
    name = f"a store takes at most {STORE_SHARE:.0%} of the bytes of the model by default"
    return Target(name, f"{share:.1%}", 0 < share <= STORE_SHARE)


def _calibration_time(rows: Mapping[str, Row]) -> Target:
    ratio = rows["calibrate-smollm2"].seconds / rows["calibrate-inputs-smollm2"].seconds
    name = f"`calibrate` takes at most {CALIBRATION_TO_INPUTS:g} times a calibration of H alone"
    return Target(name, f"{ratio:.2f} times", ratio <= CALIBRATION_TO_INPUTS)


def _calibration_memory(rows: Mapping[str, Row]) -> Target:
    ours, theirs = (
        rows[name].peak_memory_bytes or 0 for name in ("calibrate-smollm2", "calibrate-inputs-smollm2")
    )
    name = f"`calibrate` takes at most {CALIBRATION_TO_INPUTS:g} times the memory of a calibration of H alone"
    return Target(name, f"{ours / 1e9:.2f} GB, {theirs / 1e9:.2f} GB", ours <= CALIBRATION_TO_INPUTS * theirs)


def _startup(name: str, bound: float) -> Callable[[Mapping[str, Row]], Target]:
    def target(rows: Mapping[str, Row]) -> Target:
        seconds = rows[name].seconds
        return Target(f"{rows[name].name} takes at most {bound:g} s", f"{seconds:.2f} s", seconds <= bound)

    return target


_TARGETS: tuple[tuple[set[str], Callable[[Mapping[str, Row]], Target]], ...] = (
    ({"import"}, _startup("import", IMPORT_SECONDS)),
    ({"help"}, _startup("help", HELP_SECONDS)),
    ({"solve-greedy", "solve-published"}, _solver),
    ({"interpolate", "mergekit"}, _faster_than_mergekit),
    ({"interpolate", "mergekit"}, _smaller_than_mergekit),
    ({"interpolate", "work", "greedy"}, _overhead),
    ({"interpolate", "copy"}, _floor("interpolate", "copy", INTERPOLATE_TO_COPY)),
    ({"kfac", "floor"}, _floor("kfac", "floor", KFAC_TO_FLOOR)),
    ({"solve-greedy", "solve-kfac"}, _kfac),
    ({"store"}, _store),
    ({"calibrate-smollm2", "calibrate-inputs-smollm2"}, _calibration_time),
    ({"calibrate-smollm2", "calibrate-inputs-smollm2"}, _calibration_memory),
)
