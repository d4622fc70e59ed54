"""The facts of a report as pairs of a label and a text, for lists in any output."""

from collections.abc import Mapping

from deltaguard.reports.records.base import Environment
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.reports.records.sweep import SweepReport
from deltaguard.reports.text import DASH, duration, moment, nats, option, percent, short_reference, size

Facts = tuple[tuple[str, str], ...]
"""Pairs of a label and a text, in the order of reading."""


def option_facts(options: Mapping[str, str | float | bool | None]) -> Facts:
    """Every choice of a run, under the name it has as an option.

    Example:
        >>> option_facts({"method": "greedy", "other_params": "aligned"})
        (('method', 'greedy'), ('other params', 'aligned'))
    """
    return tuple((name.replace("_", " "), option(value)) for name, value in options.items())


def outcome_facts(report: RestoreReport) -> Facts:
    """The numbers of a restore over all layers, each saying of what it is a share."""
    count = len(report.layers)
    over = f"{count} layer" if count == 1 else f"{count} layers"
    cost = percent(report.safety_cost)
    if cost != DASH:
        cost = f"{cost} of the fine-tuned model's, median over {over}"
    entries = percent(report.kept_entries)
    return (
        *dial_facts(report),
        ("energy kept", f"{percent(report.kept_energy)} of the delta's energy, over {over}"),
        *(() if entries == DASH else (("entries kept", f"{entries} of the delta's entries, over {over}"),)),
        ("safety cost", cost),
        ("utility loss", f"{percent(report.utility_loss)} of the delta's squared norm"),
        ("time", times(report.seconds)),
        *((("peak memory", size(report.peak_memory_bytes)),) if report.peak_memory_bytes else ()),
    )


def dial_facts(report: RestoreReport) -> Facts:
    """What the dial did; nothing where a strength decided."""
    dial = report.dial
    if dial is None:
        return ()
    allowed = f"{nats(dial.limit)} nats a token allowed"
    if dial.whole:
        found = f"{nats(dial.finetuned_kl)}, within the {allowed}: kept whole, nothing was taken from it"
        return (("safety KL of the fine-tuned model", found),)
    count = len(dial.probes)
    margin = f" ± {nats(dial.restored_margin)}" if dial.restored_margin is not None else ""
    return (
        ("safety KL, fine-tuned", nats(dial.finetuned_kl)),
        ("safety KL, restored", f"{nats(dial.restored_kl)}{margin}, of {allowed}"),
        (
            "measured",
            f"{count} times on {dial.conversations} held-out safety conversations ({dial.tokens} tokens)",
        ),
        ("layers that paid most", ", ".join(most_shrunk(report))),
    )


def most_shrunk(report: RestoreReport, count: int = 3) -> tuple[str, ...]:
    """The layers whose deltas lost most, in squared norm, with their share of the whole loss."""
    lost = {row.name: row.utility_loss * row.delta_norm**2 for row in report.layers}
    whole = sum(lost.values())
    names = sorted(lost, key=lambda name: -lost[name])[:count]
    return tuple(f"{name.removesuffix('.weight')} ({percent(lost[name] / whole)})" for name in names if whole)


def sweep_facts(report: SweepReport) -> Facts:
    """How a sweep measured, and how much."""
    count = report.utility_conversations
    utility = (("utility data", f"{count} conversation{'' if count == 1 else 's'}"),) if count else ()
    return (
        ("method", report.method),
        *((("configuration from", report.config_from),) if report.config_from else ()),
        (
            "measured on",
            f"{report.conversations} held-out safety conversations ({report.tokens} tokens)",
        ),
        *utility,
        ("points measured", str(len(report.points))),
        ("time", duration(report.seconds)),
    )


def model_facts(report: RestoreReport | SweepReport) -> Facts:
    """The two models of a restore or a sweep with the fingerprints of their weights."""
    return tuple(
        (label, f"{short_reference(model.reference)}, fingerprint {model.fingerprint}")
        for label, model in (("fine-tuned model", report.finetuned), ("aligned model", report.aligned))
    )


def environment_facts(environment: Environment) -> Facts:
    """When and on what the numbers were made."""
    return (
        ("date", moment(environment.created)),
        ("machine", environment.machine),
        ("device", environment.device),
        ("versions", ", ".join(f"{name} {release}" for name, release in environment.versions.items())),
    )


def times(seconds: Mapping[str, float]) -> str:
    """Wall times in one line, the total before its parts.

    Example:
        >>> times({"solve": 8.0, "total": 75.0, "read": 2.25})
        '1 min 15 s (solve 8.0 s, read 2.2 s)'
    """
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items() if name != "total")
    if "total" not in seconds:
        return parts
    return f"{duration(seconds['total'])} ({parts})" if parts else duration(seconds["total"])
