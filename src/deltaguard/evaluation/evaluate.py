"""Several models on one suite, side by side: answers, verdicts, numbers with intervals, one report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter

from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.answering import (
    Candidate,
    PartFiles,
    describe,
    fill,
    missing_notes,
    model_names,
    open_files,
)
from deltaguard.evaluation.assemble import assemble
from deltaguard.evaluation.clock import Clock
from deltaguard.evaluation.engines.identity import whole_model
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.exchange import Exchange, Judge
from deltaguard.evaluation.harness_numbers import harness_notes
from deltaguard.evaluation.judges.coherence import CoherenceCheck, perplexity
from deltaguard.evaluation.judges.make import make_judge
from deltaguard.evaluation.judges.specs import ClassifierSpec, GuardSpec, tells_refusals
from deltaguard.evaluation.judging import outcome
from deltaguard.evaluation.outcomes import Outcome
from deltaguard.evaluation.suites.parts import Part, fit, resolve
from deltaguard.evaluation.suites.suite import Suite, read_suite
from deltaguard.files import read_json
from deltaguard.models.durable import write_atomically
from deltaguard.models.opened import refuse_changes
from deltaguard.models.results import EVALUATION, SECONDS_NAME, results_folder
from deltaguard.progress import Progress, ignore
from deltaguard.reports.evaluation import evaluation_card
from deltaguard.reports.records.evaluation import EVALUATION_NAME, SCHEMA_VERSION, EvaluationReport

_Files = Sequence[tuple[Candidate, Sequence[PartFiles]]]
_Judges = Sequence[tuple[Judge, bool]]
"""Each with whether its `refused` says that an answer refuses."""


class _Known(BaseModel):
    """What must be known of a report before another takes its place."""

    schema_version: int
    suite: Annotated[str, Field(max_length=200)]


_KNOWN = TypeAdapter(_Known)


@dataclass(frozen=True)
class _Run:
    """What a run works with from beginning to end."""

    folder: Path
    suite: Suite
    parts: tuple[Part, ...]
    config: EngineConfig
    device: str
    report: Progress
    notes: tuple[str, ...]
    clock: Clock


def evaluate(
    models: Sequence[str | Path],
    output_dir: str | Path,
    *,
    suite: str | Path | Suite = "quick",
    engine: EngineConfig | None = None,
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
        progress: told how far each section of each model is.

    Returns:
        The report.

    Raises:
        DeltaguardError: before any model runs, where prompts are missing, a model or judge cannot be found,
            or the folder holds answers of another suite, engine or model, or damaged ones, holds something
            else, or is a model's; later, where a model cannot be loaded or asked, or changes while it is
            asked, or a server leaves more unanswered than `engine` or a judge allows.

    Example:
        ```python
        report = evaluate(["aligned", "finetuned", "restored"], "evaluation", suite="quick")
        ```
    """
    run = _prepare(Path(output_dir), suite, engine or EngineConfig(), progress)
    candidates = _candidates(models, run)
    with results_folder(run.folder, EVALUATION, inputs=_inputs(models, run)):
        _require_same_suite(run)
        # Damaged times are told before hours of answers, not after.
        _ = run.clock.seconds
        files = [(each, open_files(run.folder, each, run.parts, run.config)) for each in candidates]
        judges = _judges(run)
        if not run.clock.path.exists():
            # First of all, so that the folder is known again however early the run is killed.
            write_atomically(run.clock.path, "{}\n")
        _fill_all(files, run)
        with run.clock.timed("judge"):
            outcomes = _judge_all(files, judges, run)
        refuse_changes(change for candidate in candidates for change in candidate.changes())
        report = _report(run, candidates, files, outcomes)
        write_atomically(run.folder / EVALUATION_NAME, report.model_dump_json(indent=2) + "\n")
        write_atomically(run.folder / "README.md", evaluation_card(report))
    return report


def _inputs(models: Sequence[str | Path], run: _Run) -> Sequence[str | Path]:
    """Models whose folders must not be written into; on a server they are names."""
    asked = () if run.config.name == "openai" else models
    read = [spec.model for spec in run.suite.judges if isinstance(spec, GuardSpec | ClassifierSpec)]
    return (*asked, *read)


def _prepare(
    folder: Path, suite: str | Path | Suite, config: EngineConfig, progress: Progress | None
) -> _Run:
    chosen = suite if isinstance(suite, Suite) else read_suite(suite)
    resolved, skipped = resolve(chosen)
    parts, unfit = fit(resolved, config.name, max_perplexity=chosen.max_perplexity)
    return _Run(
        folder=folder,
        suite=chosen,
        parts=parts,
        config=config,
        device=str(find_device(config.device)),
        report=progress or ignore,
        notes=(*skipped, *unfit),
        clock=Clock(folder / SECONDS_NAME),
    )


def _require_same_suite(run: _Run) -> None:
    """Refuse a folder whose report would be lost: it asked something else, or is of a later release."""
    path = run.folder / EVALUATION_NAME
    if not path.exists():
        return
    remedy = "Choose another output folder, or remove this file: answers and scores stay in theirs."
    known = read_json(path, _KNOWN, remedy=remedy)
    # An older one is what running again is for; a later one may hold what would be lost here.
    if known.schema_version > SCHEMA_VERSION:
        raise DeltaguardError(
            f"{path} has schema version {known.schema_version}, and this release of deltaguard writes "
            f"version {SCHEMA_VERSION}. Choose another output folder, or use the release that wrote it."
        )
    if known.suite != run.suite.name:
        raise DeltaguardError(
            f"{run.folder} holds an evaluation by the suite {known.suite}, and the suite given is "
            f"{run.suite.name}. Choose another output folder."
        )


def _candidates(models: Sequence[str | Path], run: _Run) -> tuple[Candidate, ...]:
    references = [str(model) for model in models]
    if not references:
        raise DeltaguardError("Give at least one model to evaluate.")
    if len(set(references)) < len(references):
        raise DeltaguardError(f"A model is given twice among {', '.join(references)}.")
    if any(part.second_attack is not None or part.harness is not None for part in run.parts):
        for reference in references:
            whole_model(reference)
    pairs = zip(model_names(references), references, strict=True)
    return tuple(describe(name, reference, run.config) for name, reference in pairs)


def _judges(run: _Run) -> _Judges:
    if all(part.kind == "utility" for part in run.parts):
        return ()
    judges = [
        (make_judge(spec, device=run.device, cache_dir=run.folder), tells_refusals(spec))
        for spec in run.suite.judges
    ]
    names = [judge.name for judge, _ in judges]
    if len(set(names)) < len(names):
        raise DeltaguardError(
            f"Two judges have one name: {', '.join(names)}. Set `name` of one in the suite."
        )
    return judges


def _fill_all(files: _Files, run: _Run) -> None:
    for candidate, theirs in files:
        # Model by model, so that a kill loses the time of one alone.
        with run.clock.timed("answer"):
            fill(candidate, theirs, run.folder, run.config, run.report)


def _judge_all(files: _Files, judges: _Judges, run: _Run) -> list[Outcome]:
    bound = run.suite.max_perplexity
    measured = run.config.name == "transformers" and any(part.kind != "utility" for part in run.parts)
    if bound is None or not measured:
        return _outcomes(files, judges, CoherenceCheck(), run)
    engine = TransformersEngine.open(
        files[0][0].reference,
        device=run.config.device,
        dtype=run.config.dtype,
        batch_size=run.config.batch_size,
    )
    try:
        check = CoherenceCheck(bound, partial(_perplexities, engine, run.config.batch_size))
        return _outcomes(files, judges, check, run)
    finally:
        engine.close()


def _perplexities(engine: TransformersEngine, batch_size: int, exchanges: Sequence[Exchange]) -> list[float]:
    return perplexity(engine.model, engine.tokenizer, exchanges, batch_size=batch_size)


def _outcomes(files: _Files, judges: _Judges, check: CoherenceCheck, run: _Run) -> list[Outcome]:
    refusals = [judge for judge, tells in judges if tells]
    return [
        outcome(
            candidate,
            each,
            [judge for judge, _ in judges] if each.part.kind == "attack" else refusals,
            check,
            run.report,
        )
        for candidate, theirs in files
        for each in theirs
    ]


def _report(
    run: _Run, candidates: Sequence[Candidate], files: _Files, outcomes: Sequence[Outcome]
) -> EvaluationReport:
    return assemble(
        run.suite,
        run.parts,
        candidates,
        outcomes,
        config=run.config,
        notes=(
            *run.notes,
            *(note for candidate, theirs in files for note in missing_notes(candidate, theirs)),
            *harness_notes([each for _, theirs in files for each in theirs]),
        ),
        files={
            str(file.path.relative_to(run.folder)): file.settle()
            for _, theirs in files
            for each in theirs
            for file in each.files.values()
        },
        seconds=run.clock.seconds,
    )
