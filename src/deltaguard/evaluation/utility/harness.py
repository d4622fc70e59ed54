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
from deltaguard.models.loading import refuse_code

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
    apply_chat_template: bool = True,
    seed: int,
    include_path: str | Path | None = None,
) -> list[HarnessScore]:
    """Answer tasks of the harness with a transformers model.

    Args:
        model: folder or Hub id of a causal language model.
        tasks: names of tasks or groups, such as `gsm8k`.
        limit: questions per task, from its beginning, so that models answer the same; `None` takes all.
        batch_size: questions at a time.
        device: where the model runs.
        apply_chat_template: put questions through the chat template; examples become turns before them.
        seed: fixes which examples are shown, and whatever else a task draws. The harness seeds the global
            generators of Python, numpy and torch with it.
        include_path: folder of task files of one's own, beside the harness's.

    Returns:
        Every number of every task and group, in the harness's order.

    Raises:
        DeltaguardError: lm-eval or what a task needs is not installed, a task is unknown, the model has no
            chat template to apply, or data cannot be fetched.

    Example:
        >>> run_harness("out", ["gsm8k"], limit=100, batch_size=8, device="cuda", seed=0)  # doctest: +SKIP
    """
    wanted = ["lm_eval", *(name for task in tasks for name in _NEEDED_MODULES.get(task, ()))]
    require_packages(f"The harness with {', '.join(tasks)}", "harness", *wanted)
    manager: Any = import_module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    _check_tasks(tasks, manager)
    engine = _engine(model, device, batch_size, apply_chat_template=apply_chat_template)
    evaluator = import_module("lm_eval.evaluator")
    try:
        found: Mapping[str, Any] = evaluator.simple_evaluate(
            engine,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            apply_chat_template=apply_chat_template,
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
    return scores(found, chat_template=apply_chat_template)


def scores(found: Mapping[str, Any], *, chat_template: bool) -> list[HarnessScore]:
    """The numbers in what `lm_eval.simple_evaluate` returns; it names them `metric,filter`.

    Args:
        found: the mapping it returns.
        chat_template: whether the template was applied.
    """
    return [
        HarnessScore(
            task=task,
            metric=metric if filtered == "none" else f"{metric} ({filtered})",
            value=float(values[key]),
            stderr=_number(values.get(f"{metric}_stderr,{filtered}")),
            higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            samples=sum(found["n-samples"][leaf]["effective"] for leaf in _leaves(found, task)),
            version=str(found["versions"].get(task)),
            n_shot=_shared([found["n-shot"][leaf] for leaf in _leaves(found, task)]),
            chat_template=chat_template,
            harness_version=str(found["lm_eval_version"]),
        )
        for task, values in found["results"].items()
        for key in values
        for metric, comma, filtered in [key.partition(",")]
        if comma and not metric.endswith("_stderr")
    ]


def _engine(model: str | Path, device: str, batch_size: int, *, apply_chat_template: bool) -> Any:
    refuse_code(Path(model), str(model))
    engine: Any = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=str(model), device=device, batch_size=batch_size, trust_remote_code=False
    )
    if apply_chat_template and not engine.tokenizer.chat_template:
        raise DeltaguardError(
            f"{model} has no chat template to apply. Save its chat_template.jinja next to the tokenizer, or "
            "run the harness without the template."
        )
    if apply_chat_template:
        # The harness applies it without a limit of time, so that one that has no end must be found before.
        apply_template(engine.tokenizer, [{"role": "user", "content": "How?"}])
    return engine


def _leaves(found: Mapping[str, Any], task: str) -> list[str]:
    """The tasks that a group is made of; a task is made of itself."""
    members: Sequence[str] = found["group_subtasks"].get(task, ())
    if not members:
        return [task]
    return list(dict.fromkeys(leaf for member in members for leaf in _leaves(found, member)))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _shared(values: Sequence[int]) -> int | None:
    return values[0] if len(set(values)) == 1 else None


def _check_tasks(tasks: Sequence[str], manager: Any) -> None:
    known = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise DeltaguardError(
            f"The harness has no task named {', '.join(unknown)}; `lm-eval ls tasks` lists the {len(known)} "
            "that it has."
        )
