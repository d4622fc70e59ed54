"""MMLU, GSM8K, IFEval and others through the Language Model Evaluation Harness (`lm-eval`).

Limits. The harness fetches its data sets from the Hub. Its numbers depend on its version, on the version of
each task, on the examples shown before each question and on whether the chat template is applied: all of
them are part of the result, and only like results compare.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from deltaguard.chat.template import apply_template
from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.evaluation.metrics.rates import Rate, estimate
from deltaguard.models.loading import foreign, refuse_code
from deltaguard.reports.records.evaluation import Better, Estimate, HarnessTask

# What a task adds to the harness's own requirements, by the task's name.
_NEEDED_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"ifeval": ("langdetect", "immutabledict", "nltk")}
)


@dataclass(frozen=True)
class HarnessScore:
    """One number of one task, or of a group of tasks.

    Attributes:
        task: the harness's name of the task or group.
        metric: what was measured, with the filter that answers went through where there is one:
            `acc`, `exact_match (strict-match)`.
        value: the number.
        stderr: its standard error as the harness gives it, `None` where it gives none.
        higher_is_better: which way is better, `None` where the harness does not say.
        samples: questions answered.
        version: of the task.
        n_shot: examples shown before each question; `None` for a group whose tasks differ.
        chat_template: whether questions and examples were put through the model's chat template.
        harness_version: of lm-eval.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    # Bounded, so that a damaged file is found when it is read.
    samples: Annotated[int, Field(ge=0, lt=2**53)]
    version: str
    n_shot: int | None
    chat_template: bool
    harness_version: str


def run_harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    device: str,
    dtype: str = "auto",
    seed: int,
    include_path: str | Path | None = None,
) -> list[HarnessScore]:
    """Answer tasks of the harness with a transformers model, through its chat template.

    Args:
        model: folder or Hub id of a causal language model.
        tasks: names of tasks or groups, such as `gsm8k`.
        limit: questions per task, from its beginning, so that models answer the same; `None` takes all.
        batch_size: questions at a time.
        device: where the model runs.
        dtype: of its weights; `auto` is the checkpoint's.
        seed: fixes which examples are shown, and whatever else a task draws. The harness seeds the global
            generators of Python, numpy and torch with it.
        include_path: folder of task files of one's own, beside the harness's.

    Returns:
        Every number of every task and group, in the harness's order.

    Raises:
        DeltaguardError: lm-eval or what a task needs is not installed, a task is unknown or fails, the model
            has no chat template to apply, or data cannot be fetched.

    Example:
        >>> run_harness("out", ["gsm8k"], limit=100, batch_size=8, device="cuda", seed=0)  # doctest: +SKIP
    """
    manager = find_tasks(tasks, include_path=include_path)
    engine = _engine(model, device, dtype, batch_size)
    evaluator = import_module("lm_eval.evaluator")
    # Tasks are programs of many hands: some want modules of their own, or leave to run what a model writes.
    with foreign(f"lm-eval cannot run {', '.join(tasks)}"):
        try:
            found: Mapping[str, Any] = evaluator.simple_evaluate(
                engine,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                apply_chat_template=True,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as error:
            raise DeltaguardError(
                f"The data of {', '.join(tasks)} could not be read: {error}. The harness fetches it from the "
                "Hub: run it once where the Hub can be reached, or bring tasks of your own."
            ) from error
    return scores(found, chat_template=True)


def find_tasks(tasks: Sequence[str], *, include_path: str | Path | None = None) -> Any:
    """Find tasks of the harness without running any.

    Args:
        tasks: names of tasks or groups.
        include_path: as in `run_harness`.

    Returns:
        The harness's manager of tasks.

    Raises:
        DeltaguardError: lm-eval or what a task needs is not installed, or a task is unknown.
    """
    wanted = ["lm_eval", *(name for task in tasks for name in _NEEDED_MODULES.get(task, ()))]
    require_packages(f"The harness with {', '.join(tasks)}", "harness", *wanted)
    manager: Any = import_module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    known = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise DeltaguardError(
            f"The harness has no task named {', '.join(unknown)}; `lm-eval ls tasks` lists the {len(known)} "
            "that it has."
        )
    return manager


def scores(found: Mapping[str, Any], *, chat_template: bool) -> list[HarnessScore]:
    """Read the numbers in what `lm_eval.simple_evaluate` returns; it names them `metric,filter`.

    Args:
        found: the mapping it returns.
        chat_template: whether the template was applied.
    """
    read: list[HarnessScore] = []
    for task, values in found["results"].items():
        leaves = _leaves(found, task)
        shots = [found["n-shot"][leaf] for leaf in leaves]
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            read.append(
                HarnessScore(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                    samples=sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
                    version=str(found["versions"].get(task)),
                    n_shot=shots[0] if len(set(shots)) == 1 else None,
                    chat_template=chat_template,
                    harness_version=str(found["lm_eval_version"]),
                )
            )
    return read


def _engine(model: str | Path, device: str, dtype: str, batch_size: int) -> Any:
    refuse_code(Path(model), str(model))
    engine: Any = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=str(model),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        # As everywhere else: tasks leave no room for thoughts.
        enable_thinking=False,
        trust_remote_code=False,
    )
    if not engine.tokenizer.chat_template:
        raise DeltaguardError(
            f"{model} has no chat template to apply. Save its chat_template.jinja next to the tokenizer."
        )
    # The harness applies it without a limit of time, so that one that has no end must be found before.
    apply_template(engine.tokenizer, [{"role": "user", "content": "How?"}])
    return engine


def _leaves(found: Mapping[str, Any], task: str) -> list[str]:
    """Find the tasks that a group is made of; a task is made of itself."""
    members: Sequence[str] = found["group_subtasks"].get(task, ())
    if not members:
        return [task]
    return list(dict.fromkeys(leaf for member in members for leaf in _leaves(found, member)))


Row = Mapping[str, Any]
"""A `HarnessScore` as JSON holds it."""

Rows = Mapping[str, Sequence[Row]]
"""All numbers that a model got on a part, by the task that was asked for."""


def harness_measures(rows: Rows) -> dict[str, tuple[Estimate, Better]]:
    """List the shares that lm-eval counted, with Wilson intervals over its samples.

    lm-eval gives sums over samples; metrics that are no shares have no interval that holds. Of a group such
    as MMLU the group's own numbers count, not those of its subtasks.

    Args:
        rows: of one model.
    """
    found: dict[str, tuple[Estimate, Better]] = {}
    for row in _own(rows):
        value, total = float(row["value"]), int(row["samples"])
        successes = round(value * total) if 0 <= value <= 1 else 0
        if total and 0 <= value <= 1 and abs(successes - value * total) < 1e-6 * total:
            better = "lower" if row["higher_is_better"] is False else "higher"
            found[_name(row)] = estimate(Rate(successes, total)), better
    return found


def harness_tasks(model: str, section: str, rows: Rows) -> tuple[HarnessTask, ...]:
    """Tell how each task was put to a model, one row a task whatever it measures.

    Args:
        model: name of the model.
        section: name of the section.
        rows: of one model.
    """
    by_task = {row["task"]: row for row in _own(rows)}
    shown = ("task", "version", "n_shot", "chat_template", "samples", "harness_version")
    return tuple(
        HarnessTask(model=model, section=section, **{name: row[name] for name in shown})
        for row in by_task.values()
    )


def unlike_notes(tasks: Sequence[HarnessTask]) -> tuple[str, ...]:
    """Note each task that was not put to all models alike, so that its numbers do not compare.

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


def harness_notes(found: Mapping[tuple[str, str], Sequence[Rows]]) -> tuple[str, ...]:
    """Say what the harness measured and the report leaves to its files, a note a section.

    Args:
        found: the numbers of each model, by section and name of its file.
    """
    notes: list[str] = []
    for (section, file), models in found.items():
        told = {name for rows in models for name in harness_measures(rows)}
        own = [row for rows in models for row in _own(rows)]
        tasks = {row["task"] for rows in models for measured in rows.values() for row in measured}
        left = list(dict.fromkeys(_name(row) for row in own if _name(row) not in told))
        if below := len(tasks - {row["task"] for row in own}):
            left.append(f"the numbers of {below} subtasks")
        if left:
            notes.append(
                f"Of section {section}, left to the file {file} of each model, since only a task's own "
                f"shares of samples have an interval here: {', '.join(left)}."
            )
    return tuple(notes)


def _own(rows: Rows) -> list[Row]:
    """Each task's rows without its subtasks'; a name for several tasks that has no sum gives all theirs."""
    kept = [[row for row in found if row["task"] == task] or found for task, found in rows.items()]
    return [row for found in kept for row in found]


def _name(row: Row) -> str:
    return f"{row['task']} {row['metric']}"
