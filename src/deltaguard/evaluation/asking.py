"""Ask a model every question and keep what it says; what is on disk already is not asked again."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import chain, count
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import StrictFloat, TypeAdapter

from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.folders import load_tokenizer, whole_model
from deltaguard.evaluation.engines.make import EngineConfig, make_engine
from deltaguard.evaluation.engines.transformers import resolved_dtype
from deltaguard.evaluation.exchange import Answer, Engine, LikelihoodEngine, Missed, Question, refuse_too_many
from deltaguard.evaluation.journal import SECOND_ANSWER, TEXT, AnswerFile, SecondAnswer
from deltaguard.evaluation.probes.gcg import gcg_suffix, with_suffix
from deltaguard.evaluation.probes.second_attack import attacked_again
from deltaguard.evaluation.suites.parts import Part
from deltaguard.evaluation.utility.harness import HarnessScore, Rows, run_harness
from deltaguard.models.adapter import open_model
from deltaguard.models.hub import is_local
from deltaguard.models.identity import ModelIdentity, identify
from deltaguard.models.names import place_problem
from deltaguard.models.opened import refuse_changes
from deltaguard.progress import Event, Progress

OpenEngine = Callable[[str, EngineConfig], Engine]
"""Loads a model, or connects to the server that has it."""

ANSWERS = "answers"
"""The folder, within the output folder, that holds what models answered."""

_SCHEMAS: Mapping[str, TypeAdapter[Any]] = {
    "suffixes": TEXT,
    "answers": TEXT,
    "follow-ups": SECOND_ANSWER,
    "likelihood": TypeAdapter(StrictFloat),
    "harness": TypeAdapter(list[HarnessScore]),
}
"""What a file of each kind holds for each prompt, in the order in which a model is asked for them."""

_FITTED = "`parts.fit` leaves out what an engine cannot give"


@dataclass(frozen=True)
class ModelUnderTest:
    """A model that is measured.

    Attributes:
        name: short and unique; folders and tables use it.
        reference: as the user gave it.
        fingerprint: of the weights, `None` where they cannot be seen.
        chat_template_hash: sha256, `None` where the template cannot be seen.
        identity: all that decides what it predicts, `None` where it is known by the fingerprint alone.
        changes: says what happened to its files since they were opened, a sentence each.
    """

    name: str
    reference: str
    fingerprint: str | None
    chat_template_hash: str | None
    identity: ModelIdentity | None = None
    changes: Callable[[], list[str]] = field(default=list[str], compare=False)


@dataclass(frozen=True)
class PartAnswers:
    """What one model says to one part, by what is asked for.

    Attributes:
        part: of the suite.
        files: `answers`, `follow-ups`, `likelihood`, `suffixes` and `harness`, those that the part needs.
        missed: what a server did not answer in this run, one a conversation at most; none at first.
    """

    part: Part
    files: Mapping[str, AnswerFile]
    missed: list[Missed] = field(default_factory=list[Missed])

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not any(file.missing for file in self.files.values())

    @property
    def questions(self) -> tuple[Question, ...]:
        """The part's questions as this model is asked them, with the suffixes found for it."""
        if "suffixes" not in self.files:
            return self.part.questions
        pairs = zip(self.part.questions, self.files["suffixes"].in_order(), strict=True)
        return tuple(with_suffix(question, suffix) if suffix else question for question, suffix in pairs)

    @property
    def harness_rows(self) -> Rows:
        """All numbers of the harness, by the task asked for; none where the part has none."""
        if self.part.harness is None:
            return {}
        return dict(zip(self.part.harness.tasks, self.files["harness"].in_order(), strict=True))


def describe(name: str, reference: str, config: EngineConfig) -> ModelUnderTest:
    """Identify a model without loading its weights; of one on a server nothing can be seen.

    Raises:
        DeltaguardError: it cannot be found or read.
    """
    if config.name == "openai":
        return ModelUnderTest(name, reference, None, None)
    opened = open_model(reference)
    template: str = load_tokenizer(reference).chat_template
    template_hash = sha256(template.encode()).hexdigest()
    identity = identify(opened)
    return ModelUnderTest(
        name, reference, identity.fingerprint, template_hash, identity, changes=opened.changes
    )


def model_names(references: Sequence[str]) -> list[str]:
    """Shorten references to names that differ, and serve as names of folders: the last part of each.

    Example:
        >>> model_names(["demo/aligned", "Qwen/Qwen3-0.6B@main", "other/aligned/"])
        ['aligned', 'Qwen3-0.6B', 'aligned-2']
    """
    names: list[str] = []
    for reference in references:
        # A folder may have any name; of a Hub id the revision is left out.
        plain = reference if is_local(reference) else reference.split("@")[0]
        last = re.split(r"[/\\]", plain.rstrip("/\\"))[-1]
        short = re.sub(r"[^\w.-]+", "-", last).strip(".-") or "model"
        numbered = (f"{short}-{number}" for number in count(2))
        # Some disks do not tell capitals from other letters.
        taken = {name.casefold() for name in names}
        names.append(next(name for name in chain([short], numbered) if name.casefold() not in taken))
    return names


def open_answers(
    folder: Path, model: ModelUnderTest, parts: Sequence[Part], config: EngineConfig
) -> tuple[PartAnswers, ...]:
    """Open the files of one model's answers, with what they hold from an earlier run.

    Args:
        folder: the output folder.
        model: the model.
        parts: of the suite.
        config: the engine.

    Raises:
        DeltaguardError: a file belongs to another model, suite or engine, or is damaged, answers to second
            questions follow others than the first ones that there are, or suffixes are gone that were asked.
    """
    made_by: dict[str, Any] = {
        "model": model.fingerprint or model.reference,
        "configuration": model.identity and model.identity.config_sha256,
        "tokenizer": model.identity and model.identity.tokenizer_sha256,
        "chat template": model.chat_template_hash,
        "engine": config.described,
    }
    opened: list[PartAnswers] = []
    for part in parts:
        wanted = {
            "suffixes": part.gcg is not None,
            "answers": part.decoding is not None,
            "follow-ups": bool(part.follow_ups),
            "likelihood": part.likelihood,
            "harness": part.harness is not None,
        }
        prompts = {
            "follow-ups": [then.prompt for then in part.follow_ups],
            "harness": part.harness.tasks if part.harness is not None else (),
        }
        base = folder / ANSWERS / model.name / part.name
        if problem := place_problem(folder, str(base.relative_to(folder))):
            raise DeltaguardError(f"The answers cannot be written: {problem}. Choose another output folder.")
        files = {
            kind: AnswerFile(
                base.with_name(f"{base.name}.jsonl" if kind == "answers" else f"{base.name}.{kind}.jsonl"),
                prompts=prompts.get(kind, part.plain),
                made_by={**made_by, "prompts": part.prompts_hash, **part.settings()},
                schema=schema,
            )
            for kind, schema in _SCHEMAS.items()
            if wanted[kind]
        }
        opened.append(PartAnswers(part, files))
        if part.follow_ups:
            _require_conversations(opened[-1])
        if part.gcg is not None:
            _require_suffixes(opened[-1])
    return tuple(opened)


def _require_conversations(each: PartAnswers) -> None:
    """Refuse answers to second questions that were given after other first answers than there are."""
    first, second = each.files["answers"], each.files["follow-ups"]
    given = {i: each.part.questions[i].answered(said).answer for i, said in first.values.items()}
    stray = [i for i, then in second.values.items() if given.get(i) != then["after"]]
    if stray:
        raise DeltaguardError(
            f"{second.path} holds {len(second.values)} answers to second questions, and {len(stray)} of them "
            f"were given after other first answers than {first.path} holds. Remove {second.path.name}: the "
            "second questions are asked again, and all other files stay as they are."
        )


def _require_suffixes(each: PartAnswers) -> None:
    """Refuse answers to suffixes that are not there: those that are searched for now may be others."""
    suffixes, answers = each.files["suffixes"], each.files["answers"]
    if stray := answers.values.keys() - suffixes.values.keys():
        raise DeltaguardError(
            f"{answers.path} holds {len(answers.values)} answers, and {suffixes.path} lacks the suffixes "
            f"that {len(stray)} of them were asked with. Remove {answers.path.name}, too: suffixes are "
            "searched for and asked again, and all other files stay as they are."
        )


def ask(
    model: ModelUnderTest,
    answers: Sequence[PartAnswers],
    folder: Path,
    config: EngineConfig,
    progress: Progress,
    open_engine: OpenEngine | None = None,
) -> None:
    """Have a model answer what is missing; it is loaded only where something is.

    Args:
        model: the model.
        answers: its files (see `open_answers`), which receive what it says.
        folder: the output folder, which holds the weights of a second attack while they are asked.
        config: the engine.
        progress: told of the answers so far, one stage a part.
        open_engine: loads the model; `make_engine` where absent.

    Raises:
        DeltaguardError: the model cannot be loaded or asked, its files changed since it was described, or a
            server leaves too much unanswered. No answer is kept from after the change.
    """
    run = _Asking(model, config, progress, open_engine or make_engine)
    todo = [each for each in answers if not each.complete]
    run.ask(model.reference, [e for e in todo if e.part.second_attack is None and e.part.harness is None])
    for each in todo:
        if each.part.second_attack is not None:
            progress(Event(f"{model.name}: second attack", 0, 1))
            attack, device = each.part.second_attack, config.device
            with attacked_again(model.reference, folder, attack, device=device) as attacked:
                run.ask(str(attacked), [each])
        elif each.part.harness is not None:
            run.harness(each)


@dataclass(frozen=True)
class _Asking:
    """One model being asked: keeps what it says, and ends where too much is missing."""

    model: ModelUnderTest
    config: EngineConfig
    progress: Progress
    open_engine: OpenEngine

    def ask(self, reference: str, answers: Sequence[PartAnswers]) -> None:
        """Ask for everything that needs the model in memory."""
        if not answers:
            return
        asks = {
            "suffixes": self.suffixes,
            "answers": self.answers,
            "follow-ups": self.follow_ups,
            "likelihood": self.likelihood,
        }
        with closing(self.open_engine(reference, self.config)) as engine:
            for each in answers:
                for kind, file in each.files.items():
                    if file.missing:
                        self._tell(each, kind)
                        asks[kind](engine, each)

    def harness(self, each: PartAnswers) -> None:
        """Have lm-eval measure each task that is missing."""
        options = each.part.harness
        assert options is not None  # noqa: S101
        device = str(find_device(self.config.device))
        for i in each.files["harness"].missing:
            scores = run_harness(
                whole_model(self.model.reference),
                [options.tasks[i]],
                limit=options.limit,
                batch_size=self.config.at_once,
                device=device,
                dtype=resolved_dtype(self.config.dtype, device),
                seed=options.seed,
            )
            self._keep(each, "harness", [i], [[asdict(score) for score in scores]])

    def suffixes(self, engine: Engine, each: PartAnswers) -> None:
        loaded: Any = engine
        options = each.part.gcg
        assert options is not None, _FITTED  # noqa: S101
        for i in each.files["suffixes"].missing:
            found = gcg_suffix(
                loaded.model,
                loaded.tokenizer,
                each.part.questions[i],
                steps=options.steps,
                search_width=options.search_width,
            )
            self._keep(each, "suffixes", [i], [found.text])

    def likelihood(self, engine: Engine, each: PartAnswers) -> None:
        assert isinstance(engine, LikelihoodEngine), _FITTED  # noqa: S101
        missing = each.files["likelihood"].missing
        found = engine.likelihood([each.part.questions[i] for i in missing])
        if not all(map(isfinite, found)):
            raise DeltaguardError(
                f"{self.model.reference} gives an expected answer of {each.part.name} no probability: its "
                "weights hold what is no number (`deltaguard diff --deep` looks), or its dtype is too narrow "
                "(`--dtype`)."
            )
        self._keep(each, "likelihood", missing, found)

    def answers(self, engine: Engine, each: PartAnswers) -> None:
        asked = each.questions
        self._generate(engine, each, "answers", {i: asked[i] for i in each.files["answers"].missing})

    def follow_ups(self, engine: Engine, each: PartAnswers) -> None:
        """Ask what follows the answers; without an answer, a conversation does not go on."""
        first, missing = each.files["answers"].values, each.files["follow-ups"].missing
        asked = {i: each.part.questions[i].continued(first[i]) for i in missing if i in first}
        self._generate(engine, each, "follow-ups", asked)

    def _generate(self, engine: Engine, each: PartAnswers, kind: str, asked: Mapping[int, Question]) -> None:
        """Put questions, known by their places, and keep what is said in the file of that kind."""
        decoding, places, total = each.part.decoding, list(asked), len(each.part.questions)
        assert decoding is not None, _FITTED  # noqa: S101
        whose = f"Answers to section {each.part.name} from model {self.model.name}, {self.config.described}"
        option = "--max-missing, or `max_missing` of the engine"

        def keep(chosen: Sequence[int], said: Sequence[Answer]) -> None:
            pairs = zip(chosen, said, strict=True)
            given = {places[i]: answer for i, answer in pairs if isinstance(answer, str)}
            if given:
                values = [_as_kept(asked[i], answer) for i, answer in given.items()]
                self._keep(each, kind, list(given), values)
            for answer in said:
                if isinstance(answer, Missed):
                    each.missed.append(answer)
                    refuse_too_many(each.missed, total, self.config.max_missing, whose=whose, option=option)

        if asked:
            engine.answer(list(asked.values()), decoding, on_batch=keep)

    def _tell(self, each: PartAnswers, kind: str) -> None:
        file = each.files[kind]
        stage = f"{self.model.name}: {each.part.name}" + (f" ({kind})" if kind != "answers" else "")
        self.progress(Event(stage, len(file.values), len(file.values) + len(file.missing)))

    def _keep(self, each: PartAnswers, kind: str, prompts: Sequence[int], values: Sequence[Any]) -> None:
        # Before they are kept: answers of another model would later pass for this one's.
        refuse_changes(self.model.changes())
        each.files[kind].add(prompts, values)
        self._tell(each, kind)


def _as_kept(question: Question, said: str) -> str | SecondAnswer:
    """Write an answer as its file holds it: one to a second question beside what it follows."""
    return said if question.earlier is None else {"after": question.earlier.answer, "answer": said}


def missing_notes(model: ModelUnderTest, answers: Sequence[PartAnswers]) -> tuple[str, ...]:
    """Say for each part what a server did not answer, so that a reader knows what the numbers leave out.

    Args:
        model: the model.
        answers: its files, after `ask`.
    """
    return tuple(
        f"{model.name} gave no answer to {len(each.missed)} of {len(each.part.questions)} prompts of "
        f"section {each.part.name}. Every number leaves them out, and the same command asks them again. The "
        f"first reason: {each.missed[0].reason}."
        for each in answers
        if each.missed
    )
