"""Methods beside each other, over the same fine-tunes: what each leaves of them, and what that costs."""

from functools import partial
from statistics import fmean

from deltaguard.reports.attacked import Attacked, attacked, mean_refusals, methods_of, request_seconds
from deltaguard.reports.records.attacks import AttacksReport
from deltaguard.reports.table import Cell, Column, Table, share
from deltaguard.reports.text import DASH, duration, points

_Row = tuple[str, str]
"""A fine-tune, and a way of asking."""


def beside_tables(report: AttacksReport) -> tuple[Table, ...]:
    """Tabulate all methods side by side; nothing where there is one alone."""
    methods = methods_of(report)
    if len(methods) < 2:
        return ()
    tables = (
        _left_table(report, methods),
        _kept_table(report, methods),
        Table.of(
            "What the methods cost",
            methods,
            (
                (Column("method", "name", code=True), lambda method: method),
                ("false refusals\nover aligned", partial(_refusals, report)),
                ("time of\na restore", partial(_time, report)),
            ),
            note="means over the fine-tunes and seeds",
        ),
    )
    return tuple(table for table in tables if table.rows)


def _left_table(report: AttacksReport, methods: tuple[str, ...]) -> Table:
    found = {
        (method, each.attacker.name, way): rates
        for method in methods
        for each in attacked(report, method)
        for way, rates in each.asked
    }
    rows: list[_Row] = list(dict.fromkeys((attacker, way) for _, attacker, way in found))

    def fine_tuned(row: _Row) -> Cell:
        rates = next(rates for (_, *own), rates in found.items() if tuple(own) == row)
        return _points(100 * (rates.finetuned.value - rates.aligned.value))

    def left(method: str, row: _Row) -> Cell:
        rates = found.get((method, *row))
        return Cell(DASH) if rates is None else _points(rates.over_aligned.value)

    return Table.of(
        "Attack success over aligned, by method",
        rows,
        (
            (Column("fine-tune", "name", code=True), lambda row: row[0]),
            (Column("asked", "name", under="fine-tune"), lambda row: row[1]),
            ("fine-tuned", fine_tuned),
            *((method, partial(left, method)) for method in methods),
        ),
        note="points, means over the seeds",
    )


def _kept_table(report: AttacksReport, methods: tuple[str, ...]) -> Table:
    found = {(method, each.attacker.name): each for method in methods for each in attacked(report, method)}
    rows = [row.name for row in report.attackers if row.gains]

    def kept(method: str, row: str) -> Cell:
        each: Attacked | None = found.get((method, row))
        return share(each.kept.value if each is not None and each.kept is not None else None)

    return Table.of(
        "Gain in likelihood kept, by method",
        rows,
        (
            (Column("fine-tune", "name", code=True), lambda row: row),
            *((method, partial(kept, method)) for method in methods),
        ),
        note="means over the seeds",
    )


def _refusals(report: AttacksReport, method: str) -> Cell:
    found = [mean_refusals(each.found).over_aligned.value for each in attacked(report, method)]
    return _points(fmean(found))


def _time(report: AttacksReport, method: str) -> Cell:
    seconds = fmean(request_seconds(report, each.attacker.name, method) for each in attacked(report, method))
    return Cell(duration(seconds), seconds)


def _points(value: float) -> Cell:
    return Cell(points(value), value)
