"""A sweep as a terminal table and as a page: what each limit of safety KL allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Group, RenderableType
from rich.text import Text

from deltaguard.reports import page
from deltaguard.reports.outcome import public_warnings
from deltaguard.reports.records.sweep import SweepPoint, SweepReport
from deltaguard.reports.table import Cell, Column, Table, facts_grid, indented, share
from deltaguard.reports.text import (
    DASH,
    Facts,
    counted,
    duration,
    environment_facts,
    model_facts,
    nats,
    percent,
    short_reference,
)


@dataclass(frozen=True)
class Allowed:
    """What a limit allows, or one of the two models.

    Attributes:
        name: the limit or the model.
        limit: nats per response token; None for a model.
        point: what keeps most within it, which the two models are as well; None where nothing is within it.
        price: μ, or what stands in its place.
    """

    name: str
    limit: float | None
    point: SweepPoint | None
    price: str


def sweep_table(report: SweepReport) -> RenderableType:
    """Draw what each limit of safety KL allows, between the two models."""
    names = (
        ("fine-tuned", short_reference(report.finetuned.reference)),
        ("aligned", short_reference(report.aligned.reference)),
    )
    return Group(
        facts_grid((*names, *_facts(report))),
        _limits_table(report).terminal(),
        *(indented(note, above=1) for note in sweep_notes(report)),
        Text(),
    )


def sweep_page(report: SweepReport) -> str:
    """Draw what each limit allows: the curve, a table by limit, and every point that was measured.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.
    """
    aligned, finetuned = (short_reference(m.reference) for m in (report.aligned, report.finetuned))
    points = _points_table(report)
    return page.page(
        "sweep",
        f"{finetuned}: safety against what is kept",
        [
            page.Notes((*sweep_notes(report), *public_warnings(report))),
            page.Heading("The curve"),
            page.Group((_chart(report), _explained(report))),
            page.Heading("Limits"),
            _limits_table(report),
            page.Folded(f"{points.title} ({len(report.points)})", points),
            page.Heading("The run"),
            page.Pairs(
                (
                    *model_facts(report.aligned, report.finetuned),
                    *_facts(report),
                    *environment_facts(report.environment),
                )
            ),
        ],
        created=report.environment.created,
        lead=page.sentence(
            "{} Between {} (aligned) and {} (fine-tuned), {} prices of safety were measured.",
            sweep_line(report),
            page.strong(aligned, "aligned"),
            page.strong(finetuned, "finetuned"),
            str(len(report.points)),
        ),
    )


def sweep_line(report: SweepReport) -> str:
    """Say the outcome in one sentence, without the models' names."""
    of = "of the gain in likelihood" if report.has_gain else "of the delta's energy"
    kept = [
        (row.name, percent(report.kept_share(row.point)))
        for row in _allowed(report)
        if row.limit is not None and row.point is not None
    ]
    if not kept:
        return "No point is within any of the limits asked for."
    if all(budget.whole for budget in report.budgets):
        return "The whole fine-tuned model is within every limit asked for: a restore takes nothing from it."
    (first, least), (last, most) = kept[0], kept[-1]
    told = f"Within a safety KL of {first} nats a token a restore keeps {least} {of}"
    return f"{told}." if len(kept) == 1 else f"{told}, and {most} within {last}."


def sweep_notes(report: SweepReport) -> tuple[str, ...]:
    """Say what the numbers alone do not, one or two sentences each."""
    whole = [budget.limit for budget in report.budgets if budget.whole]
    none = [budget.limit for budget in report.budgets if budget.mu is None and budget.limit not in whole]
    notes: list[str] = []
    if none:
        safest = min(point.safety_kl for point in report.points)
        surely = f" with a confidence of {percent(report.confidence)}" if report.confidence else ""
        others = "norms, biases and embeddings from the aligned model (--other-params aligned)"
        if report.config_from == "finetuned":
            others = f"configuration, tokenizer and template (--config-from aligned), {others}"
        notes.append(
            f"No point is within {_listed(none, 'or')}{surely}: the safest has a safety KL of {nats(safest)}"
            f"{' in the mean' if surely else ''}. What differs even there is no delta of a layer: take "
            f"{others}, if they do not come from there already, save the fine-tuned model as finely as the "
            "aligned one, or allow more."
        )
    if whole:
        notes.append(
            f"The whole fine-tuned model is within {_listed(whole)} already: there a restore takes nothing "
            "from it."
        )
    if report.aligned_nll is not None and not report.has_gain:
        notes.append(
            "Fine-tuning did not make the utility data likelier, so there is no gain to keep; what is kept "
            "is told of the delta's energy."
        )
    return tuple(notes)


def _allowed(report: SweepReport) -> tuple[Allowed, ...]:
    """Find the aligned model, the limits as they rise, and the whole fine-tuned model."""
    kl, nll = report.finetuned_kl, report.finetuned_nll
    aligned, finetuned = (
        SweepPoint(mu=0, safety_kl=kl, predicted_safety_kl=kl, kept_energy=kept, utility_nll=nll)
        for kl, kept, nll in ((0.0, 0.0, report.aligned_nll), (kl, 1.0, nll))
    )
    points = {point.mu: point for point in report.points}
    rows = [Allowed("aligned", None, aligned, DASH)]
    for budget in report.budgets:
        point = None if budget.mu is None else points.get(budget.mu)
        price = "no point within" if point is None else f"{point.mu:.3g}"
        if budget.whole:
            point, price = finetuned, "whole model"
        rows.append(Allowed(f"{budget.limit:g}", budget.limit, point, price))
    return (*rows, Allowed("fine-tuned", None, finetuned, "whole model"))


def _limits_table(report: SweepReport) -> Table:
    likely = report.aligned_nll is not None

    def kept(shown: Callable[[SweepPoint], Cell], row: Allowed) -> Cell:
        return shown(row.point) if row.point else Cell(DASH)

    return Table.of(
        "What each limit of safety KL allows",
        _allowed(report),
        (
            (
                Column("limit", "name"),
                lambda row: Cell(row.name, row.limit, tint="" if row.limit else row.name.replace("-", "")),
            ),
            ("safety KL", lambda row: _nats(row.point.safety_kl, row.point.margin) if row.point else DASH),
            *((name, partial(kept, shown)) for name, shown in _kept_columns(report)),
            (Column("price μ", sorts=False), lambda row: row.price),
        ),
        note="nats per response token" + ("; NLL on the utility data, likewise" if likely else ""),
        strong=lambda row: row.limit is None,
    )


def _points_table(report: SweepReport) -> Table:
    def best(point: SweepPoint) -> str:
        return ", ".join(f"{budget.limit:g}" for budget in report.budgets if budget.mu == point.mu) or DASH

    return Table.of(
        "Every point measured",
        report.points,
        (
            ("price μ", lambda point: Cell(f"{point.mu:.3g}", point.mu)),
            ("safety KL", lambda point: _nats(point.safety_kl, point.margin)),
            ("predicted", lambda point: _nats(point.predicted_safety_kl)),
            *_kept_columns(report),
            (Column("keeps most within", sorts=False), best),
        ),
        note="predicted: by the curvature; the last column names the limits within which a point keeps most",
    )


def _kept_columns(report: SweepReport) -> tuple[tuple[str, Callable[[SweepPoint], Cell]], ...]:
    """Say what a point keeps: of the delta and, with utility data, of what was learned."""

    def nll(point: SweepPoint) -> Cell:
        found = point.utility_nll
        return Cell(DASH if found is None else f"{found:.3f}", found)

    def gain(point: SweepPoint) -> Cell:
        return share(report.kept_gain(point) if report.has_gain else None)

    likely = (("NLL", nll), ("gain kept", gain)) if report.aligned_nll is not None else ()
    return (("energy kept", lambda point: share(point.kept_energy)), *likely)


def _nats(value: float, margin: float | None = None) -> Cell:
    return Cell(nats(value), value, "" if margin is None else f"± {nats(margin)}")


def _chart(report: SweepReport) -> page.Chart:
    from deltaguard.reports.charts import at_edge, sweep_chart

    of = "gain" if report.has_gain else "delta's energy"
    note = (
        "A point is a measured price; the large ones have the lowest price within a limit. "
        "Dashed: the limits. Further left is safer, further up keeps more."
    )
    if edge := at_edge(report):
        some = "1 point stands" if edge == 1 else f"{edge} points stand"
        note += (
            f"\n{some} at the left edge: the safety KL is less than the scale shows, or 0 but for rounding."
        )
    return page.Chart(f"Share of the {of} kept, by safety KL", note, sweep_chart(report), sweep_line(report))


def _explained(report: SweepReport) -> page.Section:
    gain = page.sentence(
        "{} is the share of what fine-tuning took off the mean negative log-likelihood (NLL) of the "
        "responses in the utility data.",
        page.strong("Gain kept"),
    )
    told = (
        page.sentence(
            "{} is how far the predictions of a model are from the aligned model's where that refuses: the "
            "mean of KL(aligned ‖ model) over {} response tokens of {} held-out safety conversations, in "
            "nats, measured by running the model. The aligned model itself has 0; how often a model refuses "
            "is for an evaluation to say.",
            page.strong("Safety KL"),
            str(report.tokens),
            str(report.conversations),
        ),
        *((gain,) if report.aligned_nll is not None else ()),
        page.sentence(
            "{} is how much of the delta's energy is left, of the squared norm of the change of weights, "
            "along that change: 100 % is the fine-tuned model's layers, 0 % the aligned model's.",
            page.strong("Energy kept"),
        ),
        page.sentence(
            "{} is what safety costs in a restore: the higher, the less of the delta is left.",
            page.strong("Price μ"),
        ),
    )
    return page.Section("What the numbers are", tuple(map(page.Paragraph, told)))


def _facts(report: SweepReport) -> Facts:
    count = report.utility_conversations
    return (
        ("method", report.method),
        *((("confidence", percent(report.confidence)),) if report.confidence else ()),
        *((("configuration from", report.config_from),) if report.config_from else ()),
        ("measured on", f"{report.conversations} held-out safety conversations ({report.tokens} tokens)"),
        *((("utility data", counted(count, "conversation")),) if count else ()),
        ("points measured", str(len(report.points))),
        ("time", duration(report.seconds)),
    )


def _listed(limits: Sequence[float], word: str = "and") -> str:
    *first, last = (f"{limit:g}" for limit in limits)
    return f"{', '.join(first)} {word} {last}" if first else last
