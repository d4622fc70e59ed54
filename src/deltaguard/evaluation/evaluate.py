"""Several models on one suite, side by side: answers, verdicts, numbers with intervals, one report."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError, listed, require_packages
from deltaguard.evaluation.asking import (
    ModelUnderTest,
    PartAnswers,
    ask,
    describe,
    missing_notes,
    model_names,
    open_answers,
)
from deltaguard.evaluation.engines.folders import whole_model
from deltaguard.evaluation.engines.make import EngineConfig, make_engine
from deltaguard.evaluation.exchange import Grader, Judge
from deltaguard.evaluation.folder import require_same_suite, write_report
from deltaguard.evaluation.inspect_logs import require_inspect
from deltaguard.evaluation.journal import Clock
from deltaguard.evaluation.judges.classifiers import ClassifierSpec
from deltaguard.evaluation.judges.coherence import CoherenceCheck, perplexity
from deltaguard.evaluation.judges.guards import GuardSpec
from deltaguard.evaluation.judges.llm import LLMSpec
from deltaguard.evaluation.judges.rules import RuleSpec
from deltaguard.evaluation.measure import judge
from deltaguard.evaluation.results import (
    Result,
    agreements,
    comparisons,
    measures,
    samples,
    ungraded_notes,
)
from deltaguard.evaluation.server import public_address
from deltaguard.evaluation.suites.parts import Part, fit, resolve
from deltaguard.evaluation.suites.suite import Suite, read_suite
from deltaguard.evaluation.utility.harness import Rows, find_tasks, harness_notes, unlike_notes
from deltaguard.files import expanded
from deltaguard.models.adapter import is_adapter
from deltaguard.models.durable import write_atomically
from deltaguard.models.opened import refuse_changes
from deltaguard.models.results import EVALUATION, SECONDS_NAME, results_folder
from deltaguard.progress import Progress, ignore
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.evaluation import (
    EvaluatedModel,
    EvaluationReport,
    SectionKind,
)

_SAMPLES = 3
_LIBRARIES = ("trl", "datasets", "lm-eval", "vllm", "openai", "rouge-score", "nanogcg")
"""What sections may need beyond what deltaguard itself needs."""

_Answers = Sequence[tuple[ModelUnderTest, Sequence[PartAnswers]]]


@dataclass(frozen=True)
class _Run:
    """What a run works with from beginning to end."""

    folder: Path
    suite: Suite
    parts: tuple[Part, ...]
    config: EngineConfig
    progress: Progress
    notes: tuple[str, ...]
    clock: Clock


def evaluate(
    models: Sequence[str | Path],
    output_dir: str | Path,
    *,
    suite: str | Path | Suite = "quick",
    engine: EngineConfig | None = None,
    inspect_logs: bool = False,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Ask several models the same questions, judge the answers, and compare each model with the first.

    What is answered is on disk after each batch. Run again with the same arguments, it goes on where it
    stopped; models may be added, and judges changed, without asking anything twice.

    Args:
        models: folders, Hub ids, `id@revision` or PEFT adapters; names on the server for the openai engine.
            The first is what the others are compared with.
        output_dir: receives `evaluation.json`, a README.md drawn from it, and all answers.
        suite: the name of one that comes with deltaguard, a YAML file, or a suite.
        engine: what generates the answers, transformers where absent.
        inspect_logs: whether answers and verdicts are written as logs for Inspect's viewer, too.
        progress: told how far each section of each model is.

    Returns:
        The report.

    Raises:
        DeltaguardError: before any model runs, where prompts are missing, a model, judge or task of lm-eval
            cannot be found, or Inspect is not installed, or the folder holds answers of another suite, engine
            or model, or damaged ones, holds something else, or is a model's; later, where a model cannot be
            loaded or asked, or changes while it is asked, or a server leaves more unanswered than `engine` or
            a judge allows.

    Example:
        ```python
        report = evaluate(["aligned", "finetuned", "restored"], "evaluation", suite="quick")
        ```
    """
    folder, config = expanded(output_dir), engine or EngineConfig()
    chosen = suite if isinstance(suite, Suite) else read_suite(suite)
    if inspect_logs:
        require_inspect()
    resolved, skipped = resolve(chosen, config.name)
    parts, unfit = fit(resolved, config.name, max_perplexity=chosen.max_perplexity)
    _require_work(chosen)
    clock = Clock(folder / SECONDS_NAME)
    run = _Run(folder, chosen, parts, config, progress or ignore, (*skipped, *unfit), clock)
    described = _described(models, run)
    # On a server, models are names; all others, and the judges, have folders that must not be written into.
    inputs = [] if config.name == "openai" else [*models]
    inputs += [spec.model for spec in chosen.judges if isinstance(spec, GuardSpec | ClassifierSpec)]
    with results_folder(folder, EVALUATION, inputs=inputs):
        require_same_suite(folder, chosen.name)
        # Damaged times are told before hours of answers, not after.
        _ = clock.seconds
        answers = [(model, open_answers(folder, model, parts, config)) for model in described]
        judges = _judges(run)
        _require_training(answers, config)
        _require_tasks(answers)
        if not clock.path.exists():
            # First of all, so that the folder is known again however early the run is killed.
            write_atomically(clock.path, "{}\n")
        for model, theirs in answers:
            # Model by model, so that a kill loses the time of one alone.
            with clock.timed("answer"):
                ask(model, theirs, folder, config, run.progress)
        with clock.timed("judge"):
            results = _judge_all(answers, judges, run)
        refuse_changes(change for model in described for change in model.changes())
        report = _report(run, answers, results)
        write_report(folder, report, results, inspect_logs=inspect_logs)
    return report


def _described(models: Sequence[str | Path], run: _Run) -> tuple[ModelUnderTest, ...]:
    references = [str(model) for model in models]
    if not references:
        raise DeltaguardError("Give at least one model to evaluate.")
    if len(set(references)) < len(references):
        raise DeltaguardError(f"A model is given twice among {', '.join(references)}.")
    others = any(part.second_attack is not None or part.harness is not None for part in run.parts)
    for reference in references:
        if others or run.config.name == "vllm":
            whole_model(reference)
        elif run.config.name == "transformers" and is_adapter(reference):
            require_packages("Asking an adapter", "eval", "peft")
    pairs = zip(model_names(references), references, strict=True)
    return tuple(describe(name, reference, run.config) for name, reference in pairs)


def _require_training(
    answers: Sequence[tuple[ModelUnderTest, Sequence[PartAnswers]]], config: EngineConfig
) -> None:
    """Refuse a device that no second attack can train on before hours of answers, not after."""
    parts = (each for _, theirs in answers for each in theirs if not each.complete)
    if any(each.part.second_attack is not None for each in parts):
        from deltaguard.finetuning.training import trained_on

        trained_on(config.device)


def _require_tasks(answers: Sequence[tuple[ModelUnderTest, Sequence[PartAnswers]]]) -> None:
    """Refuse tasks that the harness does not have before hours of answers, not after."""
    missing = (each.part.harness for _, theirs in answers for each in theirs if not each.complete)
    wanted = dict.fromkeys(task for harness in missing if harness is not None for task in harness.tasks)
    if wanted:
        find_tasks(list(wanted))


def _require_work(suite: Suite) -> None:
    """Refuse models as judges that no section has answers for; rules cost nothing."""
    kinds = {"graded" if section.grade else section.kind for section in suite.sections}
    idle: list[str] = []
    for spec in (each for each in suite.judges if not isinstance(each, RuleSpec)):
        wanted = {"attack"} | ({"harmless"} if spec.tells_refusals else set())
        wanted |= {"graded"} if isinstance(spec, LLMSpec) else set()
        if not kinds & wanted:
            idle.append(
                f"a judge of kind {spec.kind}, which judges sections of kind "
                f"{' or '.join(sorted(wanted - {'graded'}))}"
                f"{', and grades those with `grade: true`' if 'graded' in wanted else ''}"
            )
    if idle:
        title = f"Nothing in the suite {suite.name} is to be judged by these; leave them out, or add sections"
        raise DeltaguardError(listed(title, idle))


def _judges(run: _Run) -> dict[SectionKind, list[Judge]]:
    """Find who judges each kind of section; none where only utility is measured."""
    graded = [part.name for part in run.parts if part.grade]
    if not graded and all(part.kind == "utility" for part in run.parts):
        return {}
    device = str(find_device(run.config.device))
    judges = [(spec.make(device=device, folder=run.folder), spec.tells_refusals) for spec in run.suite.judges]
    names = [each.name for each, _ in judges]
    if len(set(names)) < len(names):
        raise DeltaguardError(
            f"Two judges have one name: {', '.join(names)}. Name a rule such as `opening` once, "
            "and give one of two other judges another `name` in the suite."
        )
    graders: list[Judge] = [each for each, _ in judges if isinstance(each, Grader)]
    if graded and not graders:
        raise DeltaguardError(
            f"Answers to {', '.join(graded)} are to be graded, and no judge can: give a language model by "
            "--judge-url and --judge-model, or a judge of kind llm in the suite."
        )
    return {
        "attack": [each for each, _ in judges],
        "harmless": [each for each, tells in judges if tells],
        "utility": graders,
    }


def _judge_all(answers: _Answers, judges: Mapping[SectionKind, list[Judge]], run: _Run) -> list[Result]:
    check, config = CoherenceCheck(), run.config
    with ExitStack() as opened:
        judged = any(part.kind != "utility" for part in run.parts)
        if run.suite.max_perplexity is not None and judged and config.name == "transformers":
            engine: Any = opened.enter_context(closing(make_engine(answers[0][0].reference, config)))
            surprise = partial(perplexity, engine.model, engine.tokenizer, batch_size=config.at_once)
            check = CoherenceCheck(run.suite.max_perplexity, surprise)
        return [
            judge(model.name, each, judges.get(each.part.kind, ()), check, run.progress)
            for model, theirs in answers
            for each in theirs
        ]


def _report(run: _Run, answers: _Answers, results: Sequence[Result]) -> EvaluationReport:
    settings = _settings(run.suite)
    hashes = {part.name: part.prompts_hash for part in run.parts}
    harness = tuple(task for result in results for task in result.harness)
    every = [each for _, theirs in answers for each in theirs]
    files = [file for each in every for file in each.files.values()]
    numbers: dict[tuple[str, str], list[Rows]] = {}
    for each in every:
        if "harness" in each.files:
            place = (each.part.name, each.files["harness"].path.name)
            numbers.setdefault(place, []).append(each.harness_rows)
    return EvaluationReport(
        environment=environment(_device(run.config), libraries=_LIBRARIES),
        suite=run.suite.name,
        suite_hash=sha256(json.dumps([settings, hashes], sort_keys=True).encode()).hexdigest(),
        settings=settings,
        engine=run.config.described,
        decoding=asdict(run.suite.decoding),
        models=tuple(EvaluatedModel.model_validate(model, from_attributes=True) for model, _ in answers),
        sections=tuple(part.row() for part in run.parts),
        measures=measures(results),
        comparisons=comparisons(results),
        agreements=agreements(results),
        harness=harness,
        samples=samples(results, _SAMPLES),
        notes=(
            *run.notes,
            *(note for model, theirs in answers for note in missing_notes(model, theirs)),
            *ungraded_notes(results),
            *harness_notes(numbers),
            *unlike_notes(harness),
        ),
        files={str(file.path.relative_to(run.folder)): file.sort() for file in files},
        seconds=run.clock.seconds,
    )


def _settings(suite: Suite) -> dict[str, Any]:
    """Find the suite without the secrets that an address may hold."""
    settings = suite.model_dump(mode="json")
    judges = [
        {**each, "base_url": public_address(each["base_url"])} if "base_url" in each else each
        for each in settings["judges"]
    ]
    return {**settings, "judges": judges}


def _device(config: EngineConfig) -> str:
    if config.base_url is not None:
        return f"server at {public_address(config.base_url)}"
    import torch

    device = "cuda" if config.name == "vllm" else str(find_device(config.device))
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        return device
    return f"{device} ({torch.cuda.get_device_name(device)})"
