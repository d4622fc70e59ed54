"""Which of the harness's many numbers become measures, how they were made, and where the others are."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaguard.evaluation.asking import PartAnswers
from deltaguard.evaluation.metrics.rates import Rate, estimate
from deltaguard.reports.records.evaluation import Better, Estimate, HarnessTask

Row = Mapping[str, Any]
"""A `HarnessScore` as JSON holds it."""


def harness_rows(each: PartAnswers) -> dict[str, list[Row]]:
    """All numbers that a model got on a part, by the task asked for; none where the part has none."""
    if each.part.harness is None:
        return {}
    return dict(zip(each.part.harness.tasks, each.files["harness"].in_order(), strict=True))


def harness_measures(rows: Mapping[str, Sequence[Row]]) -> dict[str, tuple[Estimate, Better]]:
    """Shares that lm-eval counted, with Wilson intervals over its samples.

    lm-eval gives sums over samples; metrics that are no shares have no interval that holds. Of a group such
    as MMLU the group's own numbers count, not those of its subtasks.

    Args:
        rows: by task that was asked for (see `harness_rows`).
    """
    return {
        _name(row): (share, "lower" if row["higher_is_better"] is False else "higher")
        for row in _own(rows)
        if (share := _share(row)) is not None
    }


def harness_tasks(model: str, section: str, rows: Mapping[str, Sequence[Row]]) -> tuple[HarnessTask, ...]:
    """How each task was put to a model, one row a task whatever it measures.

    Args:
        model: name of the model.
        section: name of the section.
        rows: by task that was asked for (see `harness_rows`).
    """
    by_task = {row["task"]: row for row in _own(rows)}
    shown = ("task", "version", "n_shot", "chat_template", "samples", "harness_version")
    return tuple(
        HarnessTask(model=model, section=section, **{name: row[name] for name in shown})
        for row in by_task.values()
    )


def unlike_notes(tasks: Sequence[HarnessTask]) -> tuple[str, ...]:
    """A note for each task that was not put to all models alike, so that its numbers do not compare.

    Args:
        tasks: of all models.
    """
    ways: dict[tuple[str, str], dict[tuple[object, ...], list[str]]] = {}
    for each in tasks:
        way = (each.version, each.n_shot, each.chat_template, each.samples, each.harness_version)
        ways.setdefault((each.section, each.task), {}).setdefault(way, []).append(each.model)
    return tuple(
        f"Task {task} of section {section} was not put alike to "
        f"{' and to '.join(map(', '.join, found.values()))}: their numbers do not compare."
        for (section, task), found in ways.items()
        if len(found) > 1
    )


def harness_notes(parts: Sequence[PartAnswers]) -> tuple[str, ...]:
    """What the harness measured and the report leaves to its files, a note a section.

    Args:
        parts: of all models.
    """
    files = {each.part.name: each.files["harness"].path.name for each in parts if "harness" in each.files}
    left = {
        section: _left([harness_rows(each) for each in parts if each.part.name == section])
        for section in files
    }
    return tuple(
        f"Of section {section}, left to the file {files[section]} of each model, since only a task's own "
        f"shares of samples have an interval here: {', '.join(names)}."
        for section, names in left.items()
        if names
    )


def _left(models: Sequence[Mapping[str, Sequence[Row]]]) -> list[str]:
    """What is no measure of any model, subtasks by their number."""
    told = {name for rows in models for name in harness_measures(rows)}
    own = [row for rows in models for row in _own(rows)]
    tasks = {row["task"] for rows in models for found in rows.values() for row in found}
    below = len(tasks - {row["task"] for row in own})
    names = dict.fromkeys(_name(row) for row in own if _name(row) not in told)
    return [*names, *([f"the numbers of {below} subtasks"] if below else [])]


def _own(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Each task's rows without its subtasks'; a name for several tasks that has no sum gives all theirs."""
    kept = [[row for row in found if row["task"] == task] or found for task, found in rows.items()]
    return [row for found in kept for row in found]


def _name(row: Row) -> str:
    return f"{row['task']} {row['metric']}"


def _share(row: Row) -> Estimate | None:
    value, total = float(row["value"]), int(row["samples"])
    successes = round(value * total) if 0 <= value <= 1 else 0
    if total and 0 <= value <= 1 and abs(successes - value * total) < 1e-6 * total:
        return estimate(Rate(successes, total))
    return None
