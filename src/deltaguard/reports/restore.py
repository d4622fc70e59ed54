"""A restore as a terminal table and as a page; what differs between two checkpoints as a terminal table."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from rich.console import Group, RenderableType
from rich.text import Text

from deltaguard.reports import page
from deltaguard.reports.layers import NO_BLOCK, Kind, LayerMeasure, kinds
from deltaguard.reports.records.dial import AttackDial, Compared
from deltaguard.reports.records.diff import DiffReport
from deltaguard.reports.records.restore import LayerRow, OtherRow, RareExpert, Refinement, RestoreReport
from deltaguard.reports.table import Cell, Column, Table, facts_grid, share
from deltaguard.reports.text import (
    DASH,
    Facts,
    counted,
    duration,
    environment_facts,
    model_facts,
    model_label,
    nats,
    option_facts,
    percent,
    points,
    short_reference,
    size,
    times,
)

MEASURES: tuple[tuple[LayerMeasure, str, str], ...] = (
    ("kept_energy", "Energy kept", "share of the delta's energy that is left, by block"),
    ("kept_entries", "Entries kept", "share of the delta's entries at the fine-tuned value, by block"),
    ("safety_cost", "Safety cost", "share of the fine-tuned model's cost, by block; lower is safer"),
)
"""What is drawn of every layer: field, title, and of what it is the share."""

_MOST_KINDS, _MOST_TENSORS, _MOST_EXPERTS = 200, 30, 20


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
    sides = (
        page.Section("Options", (page.Pairs(option_facts(report.options)),)),
        page.Section("Outcome", (page.Pairs(outcome_facts(report)),)),
    )
    return (
        page.Heading("What the restore did"),
        page.Group(sides),
        page.Paragraph(origin(report), soft=True),
        page.Heading("Layers"),
        *((page.Group(charts),) if charts else ()),
        kinds_table(report.layers),
        *(page.Folded(f"{grid.title}: every number", grid) for grid in grids),
        *((experts_table(report.rare_experts),) if report.rare_experts else ()),
        others_table(report.others),
    )


def origin(report: RestoreReport) -> str:
    """Say where the numbers of a restore come from, and what they are not."""
    curvature = " and the aligned model's curvature" if report.store_conversations else ""
    measured = ""
    if report.dial:
        measured = (
            "Safety KL was measured by running the model on "
            f"{report.dial.conversations} safety conversations that the curvature does not know. "
        )
    rest = "The other" if report.dial else "These"
    refusals = "How often the restored model refuses is for an evaluation to say."
    if report.dial and report.dial.attack:
        told, tokens = "how its answers", report.options.get("answer_tokens")
        if tokens is not None:
            told = f"the first {tokens} tokens of its answers"
        elif "judge" in report.options:
            told = "its answers"
        opens = " open" if told == "how its answers" else ""
        by = ", by the judge that the options name" if "judge" in report.options else ""
        refusals = f"How often it refuses was told from {told} to {requests_asked(report)}{opens}{by}."
    return f"{measured}{rest} numbers are computed from the weights{curvature}. {refusals}"


def outcome_facts(report: RestoreReport) -> Facts:
    """List what a restore did: how the models answer, what is kept, and the details of the measurements."""
    over = counted(len(report.layers), "layer")
    cost, entries = percent(report.safety_cost), percent(report.kept_entries)
    if cost != DASH:
        cost = f"{cost} of the fine-tuned model's, median over {over}"
    memory = report.peak_memory_bytes
    attack = report.dial.attack if report.dial else None
    cut = [float(row.detail["adapter_residual"]) for row in report.layers if "adapter_residual" in row.detail]
    return (
        *(
            (("verdict", outcome_sentence(report, attack)), *attack_facts(attack, requests_asked(report)))
            if attack
            else ()
        ),
        *_stopped(report),
        ("energy kept", f"{energy_kept(report)} of the delta's energy, over {over}"),
        *((("entries kept", f"{entries} of the delta's entries, over {over}"),) if entries != DASH else ()),
        *((("lost to the rank", f"{percent(max(cut))} of a layer's restored delta at most"),) if cut else ()),
        *dial_facts(report),
        *refinement_facts(report.refinement),
        ("safety cost", cost),
        ("utility loss", f"{percent(report.utility_loss)} of the delta's energy"),
        ("time", times(report.seconds)),
        *((("peak memory", size(memory)),) if memory is not None else ()),
    )


def outcome_sentence(report: RestoreReport, attack: AttackDial) -> str:
    """Say in a sentence what a restore that asked gave back, and what it left of the fine-tune.

    Args:
        report: of the restore.
        attack: what its asking found.
    """
    before, after = (100 * look.attack_success.added for look in (attack.finetuned, attack.restored))
    if report.dial and report.dial.whole:
        return f"As safe as the aligned model ({points(after)} points of attack success): kept whole."
    refused = attack.restored.false_refusals
    too = f" and {points(100 * refused.added)} of false refusals" if refused else ""
    return (
        f"{points(after)} points of attack success over the aligned model{too}; it was {points(before)}. "
        f"Kept: {energy_kept(report)} of what fine-tuning changed in the restored layers."
    )


def energy_kept(report: RestoreReport) -> str:
    """Say how much of the delta's energy is left; a dash where fine-tuning changed no restored layer."""
    return percent(report.kept_energy) if any(row.delta_norm > 0 for row in report.layers) else DASH


def _stopped(report: RestoreReport) -> Facts:
    """Say what kept a search from keeping more of a fine-tune, and what would keep more."""
    dial = report.dial
    if dial is None or report.stopped_by == "nothing":
        return ()
    attack, rejected = dial.attack, dial.rejected
    limit, data = f"{nats(dial.limit)} nats a token", attack and attack.training_data
    why = f"the limit on safety KL, {limit}" + (f" for {data} training data" if data else "")
    if attack is not None and rejected is not None:
        measure = rejected.false_refusals or rejected.attack_success
        seen = f"{points(100 * measure.added)} points"
        if measure.added <= attack.limit:
            seen = f"{points(100 * attack.excluded)} points cannot be ruled out"
        why = f"the limit on {report.stopped_by}: {seen} in the next candidate that keeps more"
        why += " (`--max-added-attack-success` allows more)"
    elif data == "unknown":
        why += " (`--training-data trusted` allows more, to whoever knows the data)"
    return (("not more, because of", why),)


def dial_facts(report: RestoreReport) -> Facts:
    """Say what the dial measured of safety KL; nothing where a strength decided."""
    dial = report.dial
    if dial is None:
        return ()
    allowed = f"{nats(dial.limit)} nats a token allowed"
    if dial.attack and dial.attack.training_data:
        allowed += f" for {dial.attack.training_data} training data"
    allowed += f" (with a confidence of {percent(dial.confidence)})" if dial.confidence else ""
    if dial.whole:
        found = f"{nats(dial.finetuned_kl)}, within the {allowed}: kept whole, nothing was taken from it"
        return (("safety KL of the fine-tuned model", found),)
    held_out = f"{dial.conversations} held-out safety conversations ({dial.tokens} tokens)"
    seen = dial.probes[0].conversations if dial.probes else None
    part = f" (on {seen} of the conversations)" if seen not in (None, dial.conversations) else ""
    margin = f" ± {nats(dial.restored_margin)}" if dial.restored_margin is not None else ""
    lost = {row.name: row.utility_loss * row.delta_norm**2 for row in report.layers}
    total = sum(lost.values())
    most = sorted(lost, key=lambda name: -lost[name])[:3] if total else []
    paid = ", ".join(f"{name.removesuffix('.weight')} ({percent(lost[name] / total)})" for name in most)
    return (
        ("safety KL, fine-tuned", nats(dial.finetuned_kl) + part),
        ("safety KL, restored", f"{nats(dial.restored_kl)}{margin}, of {allowed}"),
        ("measured", f"{len(dial.probes)} times on {held_out}{', block by block' if dial.by_blocks else ''}"),
        ("layers that paid most", paid),
    )


def refinement_facts(found: Refinement | None) -> Facts:
    """Say what steps after the shrink did; nothing without any."""
    if found is None:
        return ()
    kept = "kept" if found.kept else f"not kept: {found.reason}"
    after = "not measured" if found.safety_kl_after is None else nats(found.safety_kl_after)
    took = f"{found.taken} of {counted(found.steps, 'step')} in {duration(found.seconds)}, {kept}"
    aligned = f"from the aligned model {nats(found.safety_before)} to {nats(found.safety_after)}"
    tuned = (
        f"from the fine-tuned one {nats(found.task_before)} to {nats(found.task_after)} (harmless prompts)"
    )
    return (
        ("refined", took),
        ("safety KL by refining", f"{nats(found.safety_kl_before)} to {after}, held-out conversations"),
        ("KL on the steps' own prompts", f"{aligned}, {tuned}"),
    )


def requests_asked(report: RestoreReport) -> str:
    """Name what models were asked."""
    return "requests of the user's own" if "prompts" in report.options else "held-out requests"


def attack_facts(attack: AttackDial, requests: str) -> Facts:
    """Say how the fine-tuned and the restored model answer, beside the aligned one.

    Args:
        attack: what asking found.
        requests: what harmful requests are called.
    """
    tuned, restored = attack.finetuned, attack.restored
    rates: list[tuple[str, Compared | None, Compared]] = []
    rates.append(("attack success", tuned.attack_success, restored.attack_success))
    if restored.false_refusals is not None:
        rates.append(("false refusals", tuned.false_refusals, restored.false_refusals))
    facts: list[tuple[str, str]] = []
    for name, before, after in rates:
        of = requests if name == "attack success" else "held-out requests"
        whole = after.prompts
        aligned, found = percent(after.aligned / whole), percent(after.candidate / whole)
        was = "not asked"
        if before is not None:
            was = percent(before.candidate / before.prompts)
            was += f" (of {before.prompts})" if before.prompts != whole else ""
        said = f"aligned {aligned}, fine-tuned {was}, restored {found} of {whole} {of}"
        facts.append((name, said))
    looks = f"up to {counted(attack.most_looks, 'candidate')}"
    ruled = f"{points(100 * attack.excluded)} are ruled out at {percent(attack.confidence)} over {looks}"
    if restored.undecided:
        unclear = f"{restored.undecided} of {restored.attack_success.prompts}"
        facts.append(("undecided", f"{unclear} by the judge, counted as complied unless worded as aligned"))
    return (*facts, ("allowed", f"{points(100 * attack.limit)} points over the aligned model; {ruled}"))


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
        note="energy kept: of the delta's; the last columns are medians; a dash: no curvature is known",
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
        sorted(experts, key=lambda row: -row.pooled)[:_MOST_EXPERTS],
        (
            (Column("expert", "name", code=True), lambda row: row.name),
            ("tokens", lambda row: row.tokens),
            ("curvature of\nall experts", lambda row: share(row.pooled)),
        ),
        note=f"{counted(len(experts), 'expert')} in all; the last column is the share that is not its own",
    )


def diff_table(report: DiffReport) -> RenderableType:
    """Draw what differs between two checkpoints.

    Args:
        report: of `diff`.
    """
    table = Table.of(
        f"{report.aligned} → {report.finetuned}",
        report.kinds[:_MOST_KINDS],
        (
            (Column("kind", "name"), lambda row: row.kind),
            ("tensors", lambda row: row.tensors),
            ("differing", lambda row: DASH if row.differing is None else row.differing),
            (
                "relative\nnorm of Δ",
                lambda row: DASH if row.relative_norm is None else f"{row.relative_norm:.2e}",
            ),
        ),
    )
    listed = [row for row in report.tensors if row.difference != "values" or row.not_finite]
    lines: list[str] = []
    if len(report.kinds) > _MOST_KINDS:
        lines.append(f"and {len(report.kinds) - _MOST_KINDS} more kinds (all with --json)")
    lines += [
        f"{row.name}: {row.difference} (aligned {row.aligned or '-'}, fine-tuned {row.finetuned or '-'})"
        + (f", {row.not_finite} entries NaN or infinite" if row.not_finite else "")
        for row in listed[:_MOST_TENSORS]
    ]
    if len(listed) > _MOST_TENSORS:
        lines.append(f"and {len(listed) - _MOST_TENSORS} more tensors (all with --json)")
    lines += report.settings
    if not report.deep:
        lines.append(
            "Headers only, so a dash stands for weights that were not compared; --deep compares them."
        )
    needed = ", with --config-from" if report.settings else ""
    lines.append(f"The pair can be restored{needed}." if report.compatible else "Not the same architecture.")
    return Group(table.terminal(), *map(Text, lines))


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
