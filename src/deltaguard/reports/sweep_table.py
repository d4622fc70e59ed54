"""A sweep as a terminal table, and its words: what each limit allows."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deltaguard.reports.facts import sweep_facts
from deltaguard.reports.records.sweep import SweepPoint, SweepReport
from deltaguard.reports.terminal import facts_grid, model_names
from deltaguard.reports.text import DASH, nats, percent


@dataclass(frozen=True)
class Allowed:
    """What a limit allows, or one of the two models beside the limits.

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
    """What each limit of safety KL allows, between the two models.

    Args:
        report: of a finished sweep.

    Returns:
        Something rich can print; made for 80 columns, numbers are never cut.

    Example:
        ```python
        Console(stderr=True).print(sweep_table(report))
        ```
    """
    return Group(
        facts_grid((*model_names(report), *sweep_facts(report))),
        Text(),
        Text(" What each limit of safety KL allows (nats per response token)", "bold"),
        Text(),
        _limits(report),
        *(Padding(Text(note), (1, 0, 0, 1)) for note in sweep_notes(report)),
    )


def allowed(report: SweepReport) -> tuple[Allowed, ...]:
    """The aligned model, the limits as they rise, and the whole fine-tuned model."""
    gains = has_gain(report)
    return (
        Allowed("aligned", None, 0.0, 0.0, report.aligned_nll, 0.0 if gains else None),
        *(_at(report, budget.limit, budget.mu) for budget in report.budgets),
        _whole(report, "fine-tuned", None),
    )


def has_gain(report: SweepReport) -> bool:
    """Whether there is utility data, and fine-tuning made it likelier."""
    return any(report.kept_gain(point) is not None for point in report.points)


def kept_share(report: SweepReport, point: SweepPoint) -> float:
    """What a point keeps: of the gain where there is one, else of the delta."""
    gain = report.kept_gain(point)
    return point.kept_energy if gain is None else gain


def whole_within(report: SweepReport) -> tuple[float, ...]:
    """The limits that the whole fine-tuned model is within."""
    return tuple(budget.limit for budget in report.budgets if report.finetuned_kl <= budget.limit)


def sweep_line(report: SweepReport) -> str:
    """The outcome as one sentence, without the models' names."""
    of = "of the gain in likelihood" if has_gain(report) else "of the delta's energy"
    rows = [row for row in allowed(report) if row.limit is not None and row.safety_kl is not None]
    kept = [row.gain if has_gain(report) else row.kept for row in rows]
    if not rows:
        return "No point is within any of the limits asked for."
    if len(rows) == len(whole_within(report)) == len(report.budgets):
        return "The whole fine-tuned model is within every limit asked for: a restore takes nothing from it."
    first, last = rows[0], rows[-1]
    told = f"Within a safety KL of {first.name} nats a token a restore keeps {percent(kept[0])} {of}"
    return f"{told}." if len(rows) == 1 else f"{told}, and {percent(kept[-1])} within {last.name}."


def sweep_notes(report: SweepReport) -> tuple[str, ...]:
    """What the numbers alone do not say, one or two sentences each."""
    whole = whole_within(report)
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
    if report.aligned_nll is not None and not has_gain(report):
        notes.append(
            "Fine-tuning did not make the utility data likelier, so there is no gain to keep; what is kept "
            "is told of the delta's energy."
        )
    return tuple(notes)


def limit_text(limit: float) -> str:
    """A limit as it was asked for.

    Example:
        >>> limit_text(3e-05), limit_text(0.000125)
        ('3e-05', '0.000125')
    """
    return f"{limit:g}"


def nll_text(value: float | None) -> str:
    """A negative log-likelihood in three decimals, a dash where there is none.

    Example:
        >>> nll_text(1.23456), nll_text(None)
        ('1.235', '–')
    """
    return DASH if value is None else f"{value:.3f}"


def price_text(mu: float) -> str:
    """A price in three digits.

    Example:
        >>> price_text(0.0), price_text(123.456), price_text(1e30)
        ('0', '123', '1e+30')
    """
    return f"{mu:.3g}"


def _at(report: SweepReport, limit: float, mu: float | None) -> Allowed:
    if report.finetuned_kl <= limit:
        return _whole(report, limit_text(limit), limit)
    point = next((point for point in report.points if point.mu == mu), None)
    if point is None:
        return Allowed(limit_text(limit), limit, price="no point within")
    return Allowed(
        limit_text(limit),
        limit,
        point.safety_kl,
        point.kept_energy,
        point.utility_nll,
        report.kept_gain(point),
        price_text(point.mu),
    )


def _whole(report: SweepReport, name: str, limit: float | None) -> Allowed:
    gain = 1.0 if has_gain(report) else None
    return Allowed(name, limit, report.finetuned_kl, 1.0, report.finetuned_nll, gain, "whole model")


def _limits(report: SweepReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("limit", no_wrap=True)
    likely = ("NLL", "gain kept") if report.aligned_nll is not None else ()
    for name in ("safety KL", "energy kept", *likely, "price μ"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in allowed(report):
        told = (nll_text(row.nll), percent(row.gain)) if likely else ()
        cells = (row.name, nats(row.safety_kl), percent(row.kept), *told, row.price)
        table.add_row(*cells, style="dim" if row.limit is None else "")
    return table


def _listed(limits: Sequence[float], word: str = "and") -> str:
    *first, last = map(limit_text, limits)
    return f"{', '.join(first)} {word} {last}" if first else last
