"""A bench as a page: the curves of every method, their scores, and every number."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from deltaguard.reports import page
from deltaguard.reports.bench import (
    EXCESS,
    OFTEN,
    PLACE,
    bare,
    contests_table,
    finetune_facts,
    legends,
    preparation,
    scores_table,
    seconds_cell,
    short_command,
)
from deltaguard.reports.records.bench import BenchReport, FinetuneRow
from deltaguard.reports.table import Cell as Shown
from deltaguard.reports.table import Column, Table, estimate, excess, rate
from deltaguard.reports.text import (
    Facts,
    capital,
    environment_facts,
    model_label,
    option,
    short_reference,
    times,
)


def bench_page(report: BenchReport) -> str:
    """Draw the protocol's outcome: curves of all methods on each fine-tune, their scores, every number.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.
    """
    from deltaguard.reports.curves import panel_notes, swatch_svg

    charts = [(row, _chart(report, row)) for row in report.finetunes]
    undrawn = [
        page.Paragraph(
            f"{capital(row.title)}: {'; '.join(panel_notes(report, row)) or 'no point of a curve'}."
        )
        for row, chart in charts
        if chart is None
    ]
    tables = [
        table
        for row in report.finetunes
        for table in (scores_table(report, row), contests_table(report, row))
        if table
    ]
    every = [_points_table(report), _cells_table(report)]
    lead = page.sentence(
        "{} methods on {} fine-tunes of {}. A strength is safe where attack success is at most {} points "
        "over the aligned model's.",
        str(len(report.methods)),
        str(len(report.finetunes)),
        page.strong(short_reference(report.aligned)),
        f"{report.bound:g}",
    )
    return page.page(
        f"bench · preset {report.preset}",
        "deltaguard bench: safety against utility",
        [
            page.Notes(report.notes),
            page.Heading("Curves"),
            page.Paragraph(
                "A line is a method, a point one of its strengths over all seeds. Bands are 95 % intervals "
                "of the height, and so are upright bars of points that stand alone; level bars are those of "
                "attack success. Numbers are strengths of the first method, where there is room. Further "
                "left is safer, further up is better; the dashed line is the bound. Points are spaced evenly "
                "near 0 and ever closer beyond."
            ),
            page.Legend(report.methods),
            page.Group([chart for _, chart in charts if chart]),
            *undrawn,
            page.Heading("Scores"),
            *map(page.Paragraph, legends(report)),
            *tables,
            page.Heading("Every number"),
            *(page.Folded(f"{table.title} ({len(table.rows)})", table) for table in every),
            page.Heading("The run"),
            page.Pairs(run_facts(report)),
        ],
        created=report.environment.created,
        heading="Safety against utility",
        lead=lead,
        swatches={name: swatch_svg(place) for place, name in enumerate(report.methods)},
    )


def _points_table(report: BenchReport) -> Table:
    titles = {row.name: row.title for row in report.finetunes}
    return Table.of(
        "Points of the curves",
        report.curves,
        (
            (Column("method", "name"), lambda point: point.method),
            (Column("fine-tune", "words"), lambda point: titles[point.finetune]),
            ("strength", lambda point: Shown(option(point.strength), point.strength)),
            (EXCESS[0], lambda point: excess(point.points)),
            (EXCESS[1], lambda point: excess(point.false_refusal)),
            ("gain kept", lambda point: bare(rate(point.kept))),
            ("NLL, general,\nover aligned", lambda point: bare(estimate(point.general))),
            ("within\nthe bound", lambda point: option(point.safe)),
            ("told apart", lambda point: option(point.told_apart)),
        ),
        note="over all seeds",
    )


def _cells_table(report: BenchReport) -> Table:
    titles = {row.name: row.title for row in report.finetunes}
    return Table.of(
        "Every model measured",
        report.cells,
        (
            (Column("method", "name"), lambda cell: model_label(cell.method)),
            (Column("fine-tune", "words"), lambda cell: titles[cell.finetune]),
            ("seed", lambda cell: cell.seed),
            ("strength", lambda cell: Shown(option(cell.strength), cell.strength)),
            ("attack success", lambda cell: bare(rate(cell.attack_success))),
            ("incoherent", lambda cell: bare(rate(cell.incoherent))),
            ("false refusals", lambda cell: bare(rate(cell.false_refusal))),
            ("utility", lambda cell: bare(estimate(cell.mean_utility))),
            ("NLL, general", lambda cell: bare(estimate(cell.mean_general))),
            ("request", lambda cell: seconds_cell(cell.seconds.get("request"))),
        ),
        note="with 95 % intervals; NLL in nats a token",
    )


def _chart(report: BenchReport, row: FinetuneRow) -> page.Chart | None:
    from deltaguard.reports.curves import panel_notes, panel_svg

    svg = panel_svg(report, row)
    if svg is None:
        return None
    spoken = "; ".join(
        f"{method.text}: strength {strength.text}, kept {kept.text}"
        for method, strength, _, _, kept, *_ in (line.cells for line in scores_table(report, row).rows)
    )
    notes = (f"{capital(note)}." for note in panel_notes(report, row))
    # The page breaks the lines of a note as they are.
    note = "\n".join((finetune_facts(report, row), *notes))
    return page.Chart(capital(row.title), note, svg, f"Largest safe strengths. {spoken}.")


def run_facts(report: BenchReport) -> Facts:
    """Say how and on what a bench was run, as pairs of a label and a text."""
    once = preparation(report)
    often = {name: seconds for name, seconds in report.seconds.items() if name in OFTEN}
    # All fine-tunes in one: a thorough bench makes hundreds.
    rest = sum(seconds for name, seconds in report.seconds.items() if name not in {*once, *often})
    stages = {**once, **({"fine-tunes": rest} if rest else {}), **often}
    settings = "; ".join(
        f"{name.replace('_', ' ')} {_shown(value)}" for name, value in report.settings.items()
    )
    return (
        *environment_facts(report.environment),
        ("command", short_command(report.command)),
        ("aligned model", short_reference(report.aligned)),
        ("seeds", ", ".join(map(str, report.seeds))),
        ("settings", settings),
        ("time by stage", times(stages)),
    )


def _shown(value: Any) -> str:
    """Give a setting in words, however deep it nests."""
    if isinstance(value, Mapping):
        named = cast("Mapping[str, Any]", value).items()
        parts = [f"{name.replace('_', ' ')} {_shown(part)}" for name, part in named]
        return f"({', '.join(parts)})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(map(_shown, cast('Sequence[Any]', value)))})"
    return short_reference(value) if isinstance(value, str) and PLACE.match(value) else option(value)
