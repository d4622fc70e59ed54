"""Which of the harness's many numbers become measures, and a note of where the others are."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaguard.evaluation.answering import PartFiles
from deltaguard.evaluation.metrics.rates import Rate, estimate
from deltaguard.report.evaluation import Better, Estimate

_Row = Mapping[str, Any]
"""A `HarnessScore` as JSON holds it."""


def harness_measures(each: PartFiles) -> dict[str, tuple[Estimate, Better]]:
    """Shares that lm-eval counted, with Wilson intervals over its samples.

    lm-eval gives sums over samples; metrics that are no shares have no interval that holds. Of a group such
    as MMLU the group's own numbers count, not those of its subtasks.

    Args:
        each: what a model did on a part; nothing is found where it has no tasks.
    """
    return {
        _name(row): (rate, "lower" if row["higher_is_better"] is False else "higher")
        for rows in _by_task(each)
        for row in rows
        if (rate := _share(row)) is not None
    }


def harness_notes(parts: Sequence[PartFiles]) -> tuple[str, ...]:
    """What the harness measured and the report leaves to its files, a note a section.

    Args:
        parts: of all models.
    """
    files = {each.part.name: each.files["harness"].path.name for each in parts if "harness" in each.files}
    found: list[str] = []
    for section, file in files.items():
        ours = [each for each in parts if each.part.name == section]
        rows = [row for each in ours for rows in _by_task(each) for row in rows]
        told = {name for each in ours for name in harness_measures(each)}
        left = dict.fromkeys(_name(row) for row in rows if _name(row) not in told)
        everything = {
            row["task"] for each in ours for rows in each.files["harness"].in_order() for row in rows
        }
        below = len(everything - {row["task"] for row in rows})
        what = [*left, *([f"the numbers of {below} subtasks"] if below else [])]
        if what:
            found.append(
                f"Of section {section}, left to the file {file} of each model, since only a task's own "
                f"shares of samples have an interval here: {', '.join(what)}."
            )
    return tuple(found)


def _by_task(each: PartFiles) -> list[list[_Row]]:
    """The rows of each task that was asked for; a name for several tasks without a sum gives all theirs."""
    if each.part.harness is None:
        return []
    pairs = zip(each.part.harness.tasks, each.files["harness"].in_order(), strict=True)
    return [[row for row in rows if row["task"] == task] or list(rows) for task, rows in pairs]


def _name(row: _Row) -> str:
    return f"{row['task']} {row['metric']}"


def _share(row: _Row) -> Estimate | None:
    value, total = float(row["value"]), int(row["samples"])
    successes = round(value * total) if 0 <= value <= 1 else 0
    if total and 0 <= value <= 1 and abs(successes - value * total) < 1e-6 * total:
        return estimate(Rate(successes, total))
    return None
