"""A restore as a terminal table and as a page."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from rich.console import Group, RenderableType

from deltaguard.reports import page
from deltaguard.reports.layers import NO_BLOCK, Kind, LayerMeasure, kinds
from deltaguard.reports.outcome import energy_kept, origin, outcome_facts, public_warnings
from deltaguard.reports.records.restore import LayerRow, OtherRow, RareExpert, RestoreReport
from deltaguard.reports.table import Cell, Column, Table, facts_grid, share
from deltaguard.reports.text import (
    DASH,
    counted,
    environment_facts,
    model_facts,
    model_label,
    option_facts,
    percent,
    public_option,
    short_reference,
    size,
)

MEASURES: tuple[tuple[LayerMeasure, str, str], ...] = (
    ("kept_energy", "Energy kept", "share of the delta's energy that is left, by block"),
    ("kept_entries", "Entries kept", "share of the delta's entries at the fine-tuned value, by block"),
    ("safety_cost", "Safety cost", "share of the fine-tuned model's cost, by block; lower is safer"),
)
"""What is drawn of every layer: field, title, and of what it is the share."""

MOST_EXPERTS = 20
"""That tables list, the rarest."""


def restore_table(report: RestoreReport) -> RenderableType:
    """Draw what a restore did: the choices, the numbers, the layers by kind, and the other tensors."""
    chosen = dict(option_facts(report.options))
    method = chosen.pop("method", DASH)
    options = ", ".join(f"{name} {value}" for name, value in chosen.items())
    facts = (
        ("fine-tuned", short_reference(report.finetuned.reference)),
        ("aligned", short_reference(report.aligned.reference)),
        ("method", f"{method} ({options})" if options else method),
        *outcome_facts(report),
    )
    others = [others_table(report.others).terminal()] if report.others else []
    experts = [experts_table(report.rare_experts).terminal()] if report.rare_experts else []
    return Group(facts_grid(facts), kinds_table(report.layers).terminal(), *experts, *others)


def restore_page(report: RestoreReport) -> str:
    """Draw what one restore did: the choices, the numbers by layer, the other tensors, the files.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.
    """
    name, aligned = short_reference(report.finetuned.reference), short_reference(report.aligned.reference)
    files = Table.of(
        "Files as written",
        report.files,
        (
            (Column("file", "name", code=True), lambda row: row.name),
            ("size", lambda row: Cell(size(row.bytes), row.bytes)),
            (Column("sha256", "words", code=True, sorts=False), lambda row: row.sha256),
        ),
    )
    facts = (*model_facts(report.aligned, report.finetuned), *environment_facts(report.environment))
    return page.page(
        "restore",
        f"{name}, restored by deltaguard",
        [*restore_blocks(report), page.Heading("Files"), files, page.Heading("The run"), page.Pairs(facts)],
        created=report.environment.created,
        heading=f"{name}, restored",
        lead=page.sentence(
            "Between {} (aligned) and {} (fine-tuned), the restored model keeps {} of the delta's energy "
            "over {}.",
            page.strong(aligned, "aligned"),
            page.strong(name, "finetuned"),
            page.strong(energy_kept(report), "restored"),
            counted(len(report.layers), "layer"),
        ),
    )


def restore_blocks(report: RestoreReport) -> tuple[page.Block, ...]:
    """Draw the parts of a page that tell of a restore: options, outcome, layers, and other tensors."""
    from deltaguard.reports.charts import layers_chart

    groups = kinds(report.layers)
    blocks = sorted({block for kind in groups for block, _ in kind.layers if block != NO_BLOCK})
    charts: list[page.Chart] = []
    grids: list[Table] = []
    for measure, title, note in MEASURES:
        svg = layers_chart(report.layers, measure)
        if svg is None:
            continue
        medians = [
            f"{kind.label} {percent(found.median)} ({percent(found.low)} to {percent(found.high)})"
            for kind in groups
            if (found := kind.spread(measure)).median is not None
        ]
        spoken = f"{title} by block. Median and range by kind: {'; '.join(medians)}."
        charts.append(page.Chart(title, note, svg, spoken))
        grids.append(_grid(groups, blocks, measure, title))
    public = {name: public_option(value) for name, value in report.options.items()}
    sides = (
        page.Section("Options", (page.Pairs(option_facts(public)),)),
        page.Section("Outcome", (page.Pairs(outcome_facts(report)),)),
    )
    return (
        page.Heading("What the restore did"),
        page.Notes(public_warnings(report)),
        page.Group(sides),
        page.Paragraph(origin(report), soft=True),
        page.Heading("Layers"),
        *((page.Group(charts),) if charts else ()),
        kinds_table(report.layers),
        *(page.Folded(f"{grid.title}: every number", grid) for grid in grids),
        *((experts_table(report.rare_experts),) if report.rare_experts else ()),
        others_table(report.others),
    )


def kinds_table(layers: Sequence[LayerRow]) -> Table:
    """Tabulate the restored matrices by kind: how much of the energy is kept, and at what cost."""
    entries = ("entries\nkept", lambda kind: share(kind.spread("kept_entries").median))
    return Table.of(
        "Restored layers by kind",
        kinds(layers),
        (
            (Column("layer", "name", code=True), lambda kind: kind.label),
            ("n", lambda kind: len(kind.layers)),
            ("energy kept,\nleast", lambda kind: share(kind.spread("kept_energy").low)),
            ("\nmedian", lambda kind: share(kind.spread("kept_energy").median)),
            ("\nmost", lambda kind: share(kind.spread("kept_energy").high)),
            *((entries,) if any(row.kept_entries is not None for row in layers) else ()),
            ("safety\ncost", lambda kind: share(kind.spread("safety_cost").median)),
            ("utility\nloss", lambda kind: share(kind.spread("utility_loss").median)),
        ),
        note="energy kept: of the delta's; the last columns are medians; a dash: no curvature is known, or "
        "an adapter's rank cut the layer",
    )


def others_table(others: Sequence[OtherRow]) -> Table:
    """Tabulate the other tensors by the model they come from and the reason, in order of appearance."""
    count = Counter((row.source, row.reason) for row in others)
    differing = Counter((row.source, row.reason) for row in others if row.differs)
    return Table.of(
        "Other tensors",
        count,
        (
            (Column("taken from", "name"), lambda group: model_label(group[0])),
            ("tensors", lambda group: count[group]),
            ("that differ", lambda group: differing[group]),
            (Column("why", "words"), lambda group: group[1]),
        ),
        note="no solver touched these",
    )


def experts_table(experts: Sequence[RareExpert]) -> Table:
    """Tabulate the experts that safety conversations rarely reach, rarest first."""
    return Table.of(
        "Experts that safety conversations rarely reach",
        sorted(experts, key=lambda row: -row.pooled)[:MOST_EXPERTS],
        (
            (Column("expert", "name", code=True), lambda row: row.name),
            ("tokens", lambda row: row.tokens),
            ("curvature of\nall experts", lambda row: share(row.pooled)),
        ),
        note=f"{counted(len(experts), 'expert')} in all; the last column is the share that is not its own",
    )


def _grid(groups: Sequence[Kind], blocks: Sequence[int], measure: LayerMeasure, title: str) -> Table:
    def median(kind: Kind, block: int) -> Cell:
        return share(kind.spread(measure, block).median)

    return Table.of(
        f"{title} by block",
        blocks,
        (
            (Column("block", "name"), lambda block: block),
            *((Column(kind.label, code=True), partial(median, kind)) for kind in groups),
        ),
        note="where a block has several matrices of a kind, their median",
    )
