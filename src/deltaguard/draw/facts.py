"""The facts of a report as pairs of a label and a text, for lists in any output."""

from collections.abc import Mapping

from deltaguard.draw.text import DASH, duration, moment, option, percent, short_reference, size
from deltaguard.report.base import Environment
from deltaguard.report.restore import RestoreReport

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
    return (
        ("kept fraction", f"{percent(report.kept_fraction)} of the delta's entries, over {over}"),
        ("safety cost", cost),
        ("utility loss", f"{percent(report.utility_loss)} of the delta's squared norm"),
        ("time", times(report.seconds)),
        ("peak memory", size(report.peak_memory_bytes)),
    )


def model_facts(report: RestoreReport) -> Facts:
    """The two models of a restore with the fingerprints of their weights."""
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
