"""Answers and verdicts as logs of Inspect, for its viewer: `inspect view --log-dir OUTPUT/inspect`."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaguard.errors import require_packages
from deltaguard.evaluation.results import Result, measures
from deltaguard.models.durable import explained
from deltaguard.reports.records.base import Environment
from deltaguard.reports.records.evaluation import Estimate, EvaluationReport, Measure

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalScore

INSPECT_FOLDER = "inspect"
"""The folder in an evaluation's that holds logs, as `MODEL/SECTION.eval`."""


def require_inspect() -> None:
    """Refuse to go on where Inspect is not installed.

    Raises:
        MissingPackageError: it is not; the message names the extra.
    """
    require_packages("Writing logs of Inspect", "inspect", "inspect_ai")


def remove_inspect_logs(folder: Path) -> None:
    """Remove the logs of an earlier run, which a new report may contradict.

    Args:
        folder: the evaluation's.

    Raises:
        DeltaguardError: they cannot be removed.
    """
    logs = folder / INSPECT_FOLDER
    with explained(logs):
        if logs.exists():
            shutil.rmtree(logs)


def write_inspect_logs(folder: Path, report: EvaluationReport, results: Sequence[Result]) -> list[Path]:
    """Write a log of each model and each section that has answers.

    Prompts are shown without an attack's wrapper, as reports show them; what was never answered is left out.

    Args:
        folder: the evaluation's.
        report: what was drawn from the results.
        results: what models answered, and what judges said.

    Returns:
        The logs.

    Raises:
        DeltaguardError: one cannot be written.
        MissingPackageError: Inspect is not installed.

    Example:
        ```python
        evaluate(["aligned", "restored"], "out", inspect_logs=True)  # inspect view --log-dir out/inspect
        ```
    """
    require_inspect()
    from inspect_ai.log import write_eval_log

    references = {model.name: model.reference for model in report.models}
    paths: list[Path] = []
    for result in (each for each in results if each.answers):
        path = folder / INSPECT_FOLDER / result.model / f"{result.section.name}.eval"
        log = _log(report.suite, references[result.model], report.environment, result)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_eval_log(log, path, format="eval")
        paths.append(path)
    return paths


def _log(suite: str, reference: str, made_in: Environment, result: Result) -> "EvalLog":
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, EvalStats

    section = result.section
    rows = [_sample(result, i) for i, answer in enumerate(result.answers) if answer is not None]
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=made_in.created,
            task=f"{suite}/{section.name}",
            task_display_name=section.title,
            dataset=EvalDataset(name=section.source, samples=section.prompts),
            model=result.model,
            packages=dict(made_in.versions),
            config=EvalConfig(),
            metadata={"reference": reference, "prompts_hash": section.prompts_hash},
        ),
        results=EvalResults(
            total_samples=section.prompts,
            completed_samples=len(rows),
            scores=[_score(scorer, found) for scorer, found in _by_scorer(result).items()],
        ),
        # How long a section took is not known: other models and runs may have had a part in it.
        stats=EvalStats(started_at=made_in.created, completed_at=made_in.created),
        samples=rows,
    )


def _sample(result: Result, index: int) -> "EvalSample":
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    turns = [(result.prompts[index], result.answers[index]), *result.second[index : index + 1]]
    asked = [(question, answer) for question, answer in turns if answer is not None]
    classes: dict[str, Any] = {judge: said.classes[index] for judge, said in result.judged.items()}
    given = {f"{judge}, score": said.scores[index] for judge, said in result.judged.items()}
    given |= {name: values[index] for name, values in result.values.items()}
    scores = classes | given
    return EvalSample(
        id=index,
        epoch=1,
        input=asked[0][0],
        target="",
        messages=[
            turn
            for question, answer in asked
            for turn in (ChatMessageUser(content=question), ChatMessageAssistant(content=answer))
        ],
        output=ModelOutput.from_content(result.model, asked[-1][1]),
        scores={
            name: Score(value=value, answer=asked[-1][1])
            for name, value in scores.items()
            if value is not None
        },
    )


def _by_scorer(result: Result) -> dict[str, list[Measure]]:
    """Put measures together that one judge gave; others stand for themselves."""
    found: dict[str, list[Measure]] = {}
    for measure in measures([result]):
        found.setdefault(measure.judge or measure.name, []).append(measure)
    return found


def _score(scorer: str, found: Sequence[Measure]) -> "EvalScore":
    from inspect_ai.log import EvalMetric, EvalScore

    def metric(name: str, estimate: Estimate) -> EvalMetric:
        interval = {"low": estimate.low, "high": estimate.high, "interval": estimate.interval}
        return EvalMetric(name=name, value=estimate.value, metadata=interval)

    return EvalScore(
        name=scorer,
        scorer=scorer,
        metrics={each.name: metric(each.name, each.estimate) for each in found},
    )
