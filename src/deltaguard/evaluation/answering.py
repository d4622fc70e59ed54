"""Put every question to a model and keep what it says; what is on disk already is not asked again."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import StrictFloat, TypeAdapter

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.answers import TEXT, AnswerFile
from deltaguard.evaluation.engines.make import EngineConfig, identity, make_engine
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.exchange import Answer, Engine, Missed
from deltaguard.evaluation.missing import refuse_too_many
from deltaguard.evaluation.probes.gcg import with_suffix
from deltaguard.evaluation.special import attacked_again, harness_results, suffix
from deltaguard.evaluation.suites.parts import Part
from deltaguard.evaluation.utility.harness import HarnessScore
from deltaguard.models.names import place_problem
from deltaguard.models.opened import refuse_changes
from deltaguard.progress import Event, Progress

ANSWERS = "answers"
"""The folder, within the output folder, that holds what models answered."""

_SCHEMAS: Mapping[str, TypeAdapter[Any]] = {
    "answers": TEXT,
    "likelihood": TypeAdapter(StrictFloat),
    "suffixes": TEXT,
    "harness": TypeAdapter(list[HarnessScore]),
}
"""What a file of each kind holds for each prompt."""

_FITTED = "`parts.fit` leaves out what an engine cannot give"


@dataclass(frozen=True)
class Candidate:
    """A model that is measured.

    Attributes:
        name: short and unique; folders and tables use it.
        reference: as the user gave it.
        fingerprint: of the weights, `None` where they cannot be seen.
        chat_template_hash: sha256, `None` where the template cannot be seen.
        changes: says what happened to its files since they were opened, a sentence each.
    """

    name: str
    reference: str
    fingerprint: str | None
    chat_template_hash: str | None
    changes: Callable[[], list[str]] = field(default=list[str], compare=False)


@dataclass(frozen=True)
class PartFiles:
    """What one model says to one part, by what is asked for.

    Attributes:
        part: of the suite.
        files: `answers`, `likelihood`, `suffixes` and `harness`, those that the part needs.
        missed: what a server did not answer in this run; none at first.
    """

    part: Part
    files: Mapping[str, AnswerFile]
    missed: list[Missed] = field(default_factory=list[Missed])

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not any(file.missing for file in self.files.values())


def open_files(
    folder: Path, candidate: Candidate, parts: Sequence[Part], config: EngineConfig
) -> tuple[PartFiles, ...]:
    """The files of one model, with what they hold from an earlier run.

    Args:
        folder: the output folder.
        candidate: the model.
        parts: of the suite.
        config: the engine.

    Raises:
        DeltaguardError: a file belongs to another model, suite or engine.
    """
    return tuple(PartFiles(part, _files(folder, candidate, part, config)) for part in parts)


def _files(folder: Path, candidate: Candidate, part: Part, config: EngineConfig) -> dict[str, AnswerFile]:
    made_by: dict[str, Any] = {
        "model": candidate.fingerprint or candidate.reference,
        "chat template": candidate.chat_template_hash,
        "engine": config.described,
        "prompts": part.prompts_hash,
        **part.settings(),
    }
    wanted = {
        "answers": part.decoding is not None,
        "likelihood": part.likelihood,
        "suffixes": part.gcg is not None,
        "harness": part.harness is not None,
    }
    prompts = part.plain if part.harness is None else part.harness.tasks
    base = folder / ANSWERS / candidate.name / part.name
    if problem := place_problem(folder, str(base.relative_to(folder))):
        raise DeltaguardError(f"The answers cannot be written: {problem}. Choose another output folder.")
    return {
        kind: AnswerFile(
            base.with_name(f"{base.name}.jsonl" if kind == "answers" else f"{base.name}.{kind}.jsonl"),
            prompts=prompts,
            made_by=made_by,
            schema=_SCHEMAS[kind],
        )
        for kind, is_wanted in wanted.items()
        if is_wanted
    }


def fill(
    candidate: Candidate, parts: Sequence[PartFiles], folder: Path, config: EngineConfig, report: Progress
) -> None:
    """Have a model answer what is missing; it is loaded only where something is.

    Args:
        candidate: the model.
        parts: its files (see `open_files`).
        folder: the output folder, which holds the weights of a second attack while they are asked.
        config: the engine.
        report: told of the answers so far, one stage a section.

    Raises:
        DeltaguardError: the model cannot be loaded or asked, its files changed since it was described, or a
            server leaves too much unanswered. No answer is kept from after the change.
    """
    teller = _Teller(candidate, config, report)
    todo = [each for each in parts if not each.complete]
    plain = [each for each in todo if each.part.second_attack is None and each.part.harness is None]
    _ask(candidate.reference, plain, teller)
    for each in todo:
        if each.part.second_attack is not None:
            report(Event(f"{candidate.name}: second attack", 0, 1))
            with attacked_again(candidate.reference, folder, each.part.second_attack) as attacked:
                _ask(str(attacked), [each], teller)
        elif each.part.harness is not None:
            file = each.files["harness"]
            for i in file.missing:
                task = each.part.harness.tasks[i]
                results = harness_results(candidate.reference, task, each.part.harness, config)
                teller.keep(each, "harness", [i], [results])


@dataclass(frozen=True)
class _Teller:
    """Keeps what one model says, and says how full its files are and when too much is missing."""

    model: Candidate
    config: EngineConfig
    report: Progress

    def tell(self, each: PartFiles, kind: str) -> None:
        file = each.files[kind]
        stage = f"{self.model.name}: {each.part.name}" + (f" ({kind})" if kind != "answers" else "")
        self.report(Event(stage, len(file.values), len(file.values) + len(file.missing)))

    def keep(self, each: PartFiles, kind: str, prompts: Sequence[int], values: Sequence[Any]) -> None:
        # Before they are kept: answers of another model would later pass for this one's.
        refuse_changes(self.model.changes())
        each.files[kind].add(prompts, values)
        self.tell(each, kind)

    def miss(self, each: PartFiles, missed: Missed) -> None:
        each.missed.append(missed)
        refuse_too_many(
            each.missed,
            len(each.part.questions),
            self.config.max_missing,
            whose=f"Answers to section {each.part.name} from model {self.model.name}, "
            f"{self.config.described}",
            option="--max-missing, or `max_missing` of the engine",
        )


def _ask(reference: str, parts: Sequence[PartFiles], teller: _Teller) -> None:
    """Everything that needs the model in memory."""
    if not parts:
        return
    engine = make_engine(reference, teller.config)
    try:
        for each in parts:
            for kind in ("suffixes", "answers", "likelihood"):
                if kind in each.files and each.files[kind].missing:
                    teller.tell(each, kind)
                    _ASK[kind](engine, each, teller)
    finally:
        engine.close()


def _suffixes(engine: Engine, each: PartFiles, teller: _Teller) -> None:
    file, options = each.files["suffixes"], each.part.gcg
    assert isinstance(engine, TransformersEngine), _FITTED  # noqa: S101
    assert options is not None  # noqa: S101
    for i in file.missing:
        teller.keep(each, "suffixes", [i], [suffix(engine, each.part.questions[i], options)])


def _likelihood(engine: Engine, each: PartFiles, teller: _Teller) -> None:
    file = each.files["likelihood"]
    assert isinstance(engine, TransformersEngine), _FITTED  # noqa: S101
    missing = file.missing
    values = engine.likelihood([each.part.questions[i] for i in missing])
    teller.keep(each, "likelihood", missing, values)


def _answer(engine: Engine, each: PartFiles, teller: _Teller) -> None:
    decoding = each.part.decoding
    assert decoding is not None  # noqa: S101
    ends = each.files["suffixes"].in_order() if "suffixes" in each.files else [""] * len(each.part.questions)
    asked = [
        with_suffix(question, end) if end else question
        for question, end in zip(each.part.questions, ends, strict=True)
    ]
    missing = each.files["answers"].missing

    def keep(chosen: Sequence[int], answers: Sequence[Answer]) -> None:
        said = zip(chosen, answers, strict=True)
        given = {missing[i]: answer for i, answer in said if isinstance(answer, str)}
        if given:
            teller.keep(each, "answers", list(given), list(given.values()))
        for answer in answers:
            if isinstance(answer, Missed):
                teller.miss(each, answer)

    engine.answer([asked[i] for i in missing], decoding, on_batch=keep)


_ASK: Mapping[str, Callable[[Engine, PartFiles, _Teller], None]] = {
    "suffixes": _suffixes,
    "answers": _answer,
    "likelihood": _likelihood,
}


def missing_notes(candidate: Candidate, parts: Sequence[PartFiles]) -> tuple[str, ...]:
    """Say for each part what a server did not answer, so that a reader knows what the numbers leave out.

    Args:
        candidate: the model.
        parts: its files, after `fill`.
    """
    return tuple(
        f"{candidate.name} gave no answer to {len(each.missed)} of {len(each.part.questions)} prompts of "
        f"section {each.part.name}. Every number leaves them out, and the same command asks them again. The "
        f"first reason: {each.missed[0].reason}."
        for each in parts
        if each.missed
    )


def model_names(references: Sequence[str]) -> list[str]:
    """Short names that differ, and serve as names of folders: the last part of each reference.

    Example:
        >>> model_names(["demo/aligned", "Qwen/Qwen3-0.6B@main", "other/aligned/"])
        ['aligned', 'Qwen3-0.6B', 'aligned-2']
    """
    names: list[str] = []
    for reference in references:
        last = re.split(r"[/\\]", reference.split("@")[0].rstrip("/\\"))[-1]
        short = re.sub(r"[^\w.-]+", "-", last).strip(".-") or "model"
        numbered = (f"{short}-{number}" for number in count(2))
        names.append(next(name for name in chain([short], numbered) if name not in names))
    return names


def describe(name: str, reference: str, config: EngineConfig) -> Candidate:
    """A model as reports know it, without loading its weights.

    Raises:
        DeltaguardError: it cannot be found or read.
    """
    seen = identity(reference, config)
    template = seen.chat_template
    return Candidate(
        name=name,
        reference=reference,
        fingerprint=seen.fingerprint,
        chat_template_hash=None if template is None else sha256(template.encode()).hexdigest(),
        changes=seen.changes,
    )
