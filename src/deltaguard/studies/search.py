"""Which strengths of a method are measured."""

from collections.abc import Callable, Iterator, Sequence

from deltaguard.reports.records.bench import Cell


def measured_strengths(
    ladder: Sequence[float],
    probes: int | None,
    *,
    is_safe: Callable[[Sequence[Cell]], bool],
    cells_at: Callable[[float], Sequence[Cell]],
) -> Iterator[Cell]:
    """Measure a method at every rung of its ladder, or look for the largest rung that is safe.

    The search halves the rungs: a safe one leads to those that keep more, an unsafe one to those that keep
    less. Where attack success rises with strength, it ends at the largest safe rung.

    Args:
        ladder: strengths, rising.
        probes: how many strengths at most; `None` measures all.
        is_safe: judges the cells of one strength.
        cells_at: measures a strength, for every seed.

    Yields:
        The cells, in the order measured.
    """
    if probes is None:
        for strength in ladder:
            yield from cells_at(strength)
        return
    low, high = 0, len(ladder)
    for _ in range(probes):
        if low == high:
            return
        middle = (low + high) // 2
        cells = cells_at(ladder[middle])
        yield from cells
        low, high = (middle + 1, high) if is_safe(cells) else (low, middle)
