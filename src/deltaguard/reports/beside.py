"""Methods beside each other, over the same fine-tunes: what each leaves of them, and what that costs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from deltaguard.reports.attacked import Attacked, attacked, mean_refusals, methods_of, request_seconds
from deltaguard.reports.records.attacks import AttacksReport, Rates
from deltaguard.reports.table import Cell, Column, Table, share
from deltaguard.reports.text import DASH, duration, points

_Row = TypeVar("_Row")
_Found = dict[str, dict[str, Attacked]]
"""What methods left, by the fine-tune's name and the method."""

_FINE_TUNE = Column("fine-tune", "name", code=True)
_OVER_ALIGNED = "points, means over the seeds"


def beside_tables(report: AttacksReport) -> tuple[Table, ...]:
    """Tabulate all methods side by side; nothing where there is one alone."""
    methods = methods_of(report)
    if len(methods) < 2:
        return ()
    found: _Found = {}
    for method in methods:
        for each in attacked(report, method):
            found.setdefault(each.attacker.name, {})[method] = each
    tables = (
        _left_table(found, methods),
        _refusals_table(found, methods),
        _kept_table(found, methods),
        _time_table(report, found, methods),
    )
    return tuple(table for table in tables if table.rows)


def _left_table(found: _Found, methods: Sequence[str]) -> Table:
    def rates(row: tuple[str, str], method: str) -> Rates | None:
        name, way = row
        return dict(found[name][method].asked).get(way) if method in found[name] else None

    def left(method: str, row: tuple[str, str]) -> Cell:
        return _over_aligned(rates(row, method))

    def fine_tuned(row: tuple[str, str]) -> Cell:
        return _fine_tuned(next(each for method in methods if (each := rates(row, method))))

    ways = [(name, way) for name, by in found.items() for each in by.values() for way, _ in each.asked]
    return Table.of(
        "Attack success over aligned, by method",
        dict.fromkeys(ways),
        (
            (_FINE_TUNE, lambda row: row[0]),
            (Column("asked", "name", under="fine-tune"), lambda row: row[1]),
            ("fine-tuned", fine_tuned),
            *_by_method(methods, left),
        ),
        note=_OVER_ALIGNED,
    )


def _refusals_table(found: _Found, methods: Sequence[str]) -> Table:
    def fine_tuned(name: str) -> Cell:
        return _fine_tuned(mean_refusals(next(iter(found[name].values())).found))

    def refused(method: str, name: str) -> Cell:
        each = found[name].get(method)
        return _over_aligned(None if each is None else mean_refusals(each.found))

    return Table.of(
        "False refusals over aligned, by method",
        found,
        (
            (_FINE_TUNE, str),
            ("fine-tuned", fine_tuned),
            *_by_method(methods, refused),
        ),
        note=_OVER_ALIGNED,
    )


def _kept_table(found: _Found, methods: Sequence[str]) -> Table:
    def kept(method: str, name: str) -> Cell:
        each = found[name].get(method)
        return share(each.kept.value if each is not None and each.kept is not None else None)

    return Table.of(
        "Gain in likelihood kept, by method",
        [name for name, by in found.items() if any(each.attacker.gains for each in by.values())],
        ((_FINE_TUNE, str), *_by_method(methods, kept)),
        note="means over the seeds",
    )


def _time_table(report: AttacksReport, found: _Found, methods: Sequence[str]) -> Table:
    def time(method: str, name: str) -> Cell:
        if method not in found[name]:
            return Cell(DASH)
        seconds = request_seconds(report, name, method)
        return Cell(duration(seconds), seconds)

    return Table.of(
        "Time of a restore, by method",
        found,
        ((_FINE_TUNE, str), *_by_method(methods, time)),
        note="means over the seeds",
    )


def _by_method(
    methods: Sequence[str], cell: Callable[[str, _Row], Cell]
) -> list[tuple[str, Callable[[_Row], Cell]]]:
    return [(method, partial(cell, method)) for method in methods]


def _fine_tuned(rates: Rates) -> Cell:
    return _points(100 * (rates.finetuned.value - rates.aligned.value))


def _over_aligned(rates: Rates | None) -> Cell:
    return Cell(DASH) if rates is None else _points(rates.over_aligned.value)


def _points(value: float) -> Cell:
    return Cell(points(value), value)
