"""A sweep as a terminal table and as a page: what each limit of safety KL allows."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from deltaguard.reports import page
from deltaguard.reports.records.sweep import SweepReport
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

_ENERGY = "energy kept"


@dataclass(frozen=True)
class Allowed:
    """What a limit allows, or one of the two models.

    Attributes:
        name: the limit or the model.
        limit: nats per response token; None for a model.
        safety_kl: measured; None where no point is within the limit.
        kept: share of the delta's energy, likewise.
        nll: on the utility data, likewise, and None without any.
        gain: share of the gain in likelihood, likewise.
        price: μ, or what stands in its place.
    """

    name: str
    limit: float | None
    safety_kl: float | None = None
    kept: float | None = None
    nll: float | None = None
    gain: float | None = None
    price: str = DASH


def sweep_table(report: SweepReport) -> RenderableType:
    """Draw what each limit of safety KL allows, between the two models.

    Args:
        report: of a finished sweep.

    Returns:
        Something rich can print; made for 80 columns, numbers are never cut.

    Example:
        ```python
        Console(stderr=True).print(sweep_table(report))
        ```
    """
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

    Args:
        report: of a finished sweep.

    Returns:
        A complete HTML document.

    Raises:
        MissingPackageError: what charts are drawn with is not installed.

    Example:
        ```python
        Path("report.html").write_text(sweep_page(report), encoding="utf-8")
        ```
    """
    aligned, finetuned = (short_reference(m.reference) for m in (report.aligned, report.finetuned))
    points = _points_table(report)
    return page.page(
        "sweep",
        f"{finetuned}: safety against what is kept",
        [
            page.Notes(sweep_notes(report)),
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
    rows = [row for row in _allowed(report) if row.limit is not None and row.safety_kl is not None]
    kept = [row.gain if report.has_gain else row.kept for row in rows]
    if not rows:
        return "No point is within any of the limits asked for."
    if len(rows) == len(_whole_within(report)) == len(report.budgets):
        return "The whole fine-tuned model is within every limit asked for: a restore takes nothing from it."
    first, last = rows[0], rows[-1]
    told = f"Within a safety KL of {first.name} nats a token a restore keeps {percent(kept[0])} {of}"
    return f"{told}." if len(rows) == 1 else f"{told}, and {percent(kept[-1])} within {last.name}."


def sweep_notes(report: SweepReport) -> tuple[str, ...]:
    """Say what the numbers alone do not, one or two sentences each."""
    whole = _whole_within(report)
    none = [b.limit for b in report.budgets if b.mu is None and b.limit not in whole]
    notes: list[str] = []
    if none:
        safest = min(point.safety_kl for point in report.points)
        notes.append(
            f"No point is within {_listed(none, 'or')}: the safest has a safety KL of {nats(safest)}. What "
            "differs even there is no delta of a layer: take norms, biases and embeddings from the aligned "
            "model (--other-params aligned), if they do not come from there already, or allow more."
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
    """The aligned model, the limits as they rise, and the whole fine-tuned model."""
    gains = report.has_gain
    whole = Allowed(
        "fine-tuned",
        None,
        report.finetuned_kl,
        1.0,
        report.finetuned_nll,
        1.0 if gains else None,
        "whole model",
    )
    points = {point.mu: point for point in report.points}
    rows = [Allowed("aligned", None, 0.0, 0.0, report.aligned_nll, 0.0 if gains else None)]
    for budget in report.budgets:
        name, limit = f"{budget.limit:g}", budget.limit
        point = None if budget.mu is None else points.get(budget.mu)
        if report.finetuned_kl <= limit:
            rows.append(Allowed(name, limit, *(whole.safety_kl, 1.0, whole.nll, whole.gain, whole.price)))
        elif point is None:
            rows.append(Allowed(name, limit, price="no point within"))
        else:
            numbers = (point.safety_kl, point.kept_energy, point.utility_nll, report.kept_gain(point))
            rows.append(Allowed(name, limit, *numbers, f"{point.mu:.3g}"))
    return (*rows, whole)


def _limits_table(report: SweepReport) -> Table:
    likely, rows = report.aligned_nll is not None, _allowed(report)
    return Table.of(
        "What each limit of safety KL allows",
        (
            Column("limit", kind="name"),
            "safety KL",
            _ENERGY,
            *(("NLL", "gain kept") if likely else ()),
            Column("price μ", sorts=False),
        ),
        [
            (
                Cell(row.name, row.limit, tint="" if row.limit else row.name.replace("-", "")),
                Cell(nats(row.safety_kl), row.safety_kl),
                share(row.kept),
                *((_nll(row.nll), share(row.gain)) if likely else ()),
                row.price,
            )
            for row in rows
        ],
        note="nats per response token" + ("; NLL on the utility data, likewise" if likely else ""),
        strong=(0, len(rows) - 1),
    )


def _points_table(report: SweepReport) -> Table:
    likely = report.aligned_nll is not None
    best = {
        point.mu: ", ".join(f"{budget.limit:g}" for budget in report.budgets if budget.mu == point.mu)
        for point in report.points
    }
    return Table.of(
        "Every point measured",
        (
            "price μ",
            "safety KL",
            "predicted",
            _ENERGY,
            *(("NLL", "gain kept") if likely else ()),
            Column("keeps most within", sorts=False),
        ),
        [
            (
                Cell(f"{point.mu:.3g}", point.mu),
                Cell(nats(point.safety_kl), point.safety_kl),
                Cell(nats(point.predicted_safety_kl), point.predicted_safety_kl),
                share(point.kept_energy),
                *((_nll(point.utility_nll), share(report.kept_gain(point))) if likely else ()),
                best[point.mu] or DASH,
            )
            for point in report.points
        ],
        note="predicted: by the curvature; the last column names the limits within which a point keeps most",
    )


def _chart(report: SweepReport) -> page.Chart:
    from deltaguard.reports.charts import at_edge, sweep_chart

    of = "gain" if report.has_gain else "delta's energy"
    note = (
        f"A point is a measured price; the large ones keep most of the {of} within a limit. "
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
    """How a sweep measured, and how much."""
    count = report.utility_conversations
    return (
        ("method", report.method),
        *((("configuration from", report.config_from),) if report.config_from else ()),
        ("measured on", f"{report.conversations} held-out safety conversations ({report.tokens} tokens)"),
        *((("utility data", counted(count, "conversation")),) if count else ()),
        ("points measured", str(len(report.points))),
        ("time", duration(report.seconds)),
    )


def _nll(value: float | None) -> Cell:
    return Cell(DASH if value is None else f"{value:.3f}", value)


def _whole_within(report: SweepReport) -> tuple[float, ...]:
    """The limits that the whole fine-tuned model is within."""
    return tuple(budget.limit for budget in report.budgets if report.finetuned_kl <= budget.limit)


def _listed(limits: Sequence[float], word: str = "and") -> str:
    *first, last = (f"{limit:g}" for limit in limits)
    return f"{', '.join(first)} {word} {last}" if first else last
