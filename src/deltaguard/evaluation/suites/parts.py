"""A suite made concrete: every prompt of every section, before any model runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

from deltaguard.chat.conversations import (
    general_prompts,
    harmful_prompts,
    harmless_prompts,
    unseen_harmful,
    unseen_harmless,
)
from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.evaluation.datasets.load import DATASETS, drawn, load_set
from deltaguard.evaluation.engines.make import EngineName
from deltaguard.evaluation.exchange import Decoding, FollowUp, Question
from deltaguard.evaluation.probes.gcg import require_nanogcg
from deltaguard.evaluation.probes.second_attack import attack_conversations
from deltaguard.evaluation.probes.wrappers import LANGUAGES, PROBES, translated_prompts
from deltaguard.evaluation.suites.suite import Builtin, Gcg, Harness, SecondAttack, Section, Suite
from deltaguard.evaluation.utility.scores import SCORERS
from deltaguard.finetuning.tasks import task_examples
from deltaguard.reports.records.evaluation import SECOND_ATTACK, SectionKind, SectionRow

_TASK_EXAMPLES = 200

_NEEDED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "second_attack": (("trl", "datasets", "accelerate", "peft"), "demo"),
    "harness": (("lm_eval",), "harness"),
}
"""What an option of a section cannot run without, and the extra that brings it."""


_ENGINES: Mapping[str, tuple[EngineName, ...]] = {
    "second_attack": ("transformers", "vllm"),
    "harness": ("transformers",),
    "gcg": ("transformers",),
}
"""What can run an option: the last two need the model itself."""


@dataclass(frozen=True)
class Part:
    """One row of the report: a section of the suite, or one of its variants.

    Attributes:
        name: unique, such as `attack` or `attack/base64`.
        kind: whether refusing is right, wrong, or not what is asked about.
        title: for people.
        source: where the prompts come from and under which terms.
        questions: as they are put to the models; without those a harness brings itself. Either all are
            followed by another one, or none is.
        plain: each question's request before any wrapper, in English, which judges see.
        decoding: how answers are drawn; `None` where none are.
        scorers: of answers against the expected ones.
        likelihood: whether that of the expected answers is measured.
        grade: whether language models among the judges grade the answers.
        second_attack: fine-tune the model again before it is asked.
        gcg: search a suffix for each question.
        harness: tasks of lm-eval instead of questions.
    """

    name: str
    kind: SectionKind
    title: str
    source: str
    questions: tuple[Question, ...]
    plain: tuple[str, ...]
    decoding: Decoding | None = None
    scorers: tuple[str, ...] = ()
    likelihood: bool = False
    grade: bool = False
    second_attack: SecondAttack | None = None
    gcg: Gcg | None = None
    harness: Harness | None = None

    @property
    def follow_ups(self) -> tuple[FollowUp, ...]:
        """What is asked next in each conversation; empty where each question is asked alone.

        Raises:
            ValueError: some of the questions are followed by another, and some are not.
        """
        found = tuple(each.follow_up for each in self.questions if each.follow_up is not None)
        if found and len(found) < len(self.questions):
            raise ValueError(
                f"{len(found)} of {len(self.questions)} questions of {self.name} is followed by another, and "
                "either all are or none is."
            )
        return found

    @property
    def prompts_hash(self) -> str:
        """sha256 of the questions, in their order, with all that belongs to them, follow-ups included."""
        content = [_hashed(question) for question in self.questions]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def settings(self) -> dict[str, object]:
        """List what a model's answers depend on, apart from the prompts and the model."""
        options = (self.second_attack, self.gcg, self.harness)
        given = [option.model_dump(mode="json") for option in options if option is not None]
        return {"decoding": None if self.decoding is None else asdict(self.decoding), "options": given}

    def row(self) -> SectionRow:
        """Write the part as reports hold it."""
        return SectionRow(
            name=self.name,
            kind=self.kind,
            title=self.title,
            prompts=len(self.questions),
            prompts_hash=self.prompts_hash,
            source=self.source,
            max_new_tokens=0 if self.decoding is None else self.decoding.max_new_tokens,
        )


def _hashed(question: Question) -> dict[str, Any]:
    """List all of a question but the other turns that it does not have.

    Folders of answers know their questions by the hash, which stays as it was for questions of one turn.
    """
    turns = ("follow_up", "earlier")
    return {name: value for name, value in asdict(question).items() if value is not None or name not in turns}


def find_prompts(section: Section) -> tuple[Part, tuple[str, ...]]:
    """Find the prompts of a section, as a part that does not say yet how answers are drawn.

    Args:
        section: of a suite.

    Returns:
        The part, and what else a reader must know, such as rows that were left out.

    Raises:
        DeltaguardError: they cannot be had; the message says where to get them.
    """
    title, origin, notes = section.name, "", tuple[str, ...]()
    questions: Sequence[Question] = []
    originals: dict[str, str] = {}
    if section.harness is not None:
        terms = f"tasks of lm-eval under their own terms: {', '.join(section.harness.tasks)}"
    elif section.builtin is not None:
        questions, name = builtin_questions(section.builtin, section.count, section.seed), section.builtin
        terms, origin = f"deltaguard's own prompts, part {name}", f"the set {name}"
        if name == "translated":
            rows = [row for language in LANGUAGES for row in translated_prompts(language)]
            originals = {row.prompt: row.original for row in rows}
    else:
        if section.dataset is not None:
            if section.dataset not in DATASETS:
                raise DeltaguardError(
                    f"there is no data set {section.dataset}; there are {', '.join(DATASETS)}."
                )
            known = DATASETS[section.dataset]
            title, terms = known.title, f"{known.title}: {known.homepage}; terms: {known.terms}"
            loaded = load_set(section.dataset, path=section.path)
        else:
            assert section.file is not None  # noqa: S101  # the schema demands one of the four
            terms, loaded = f"the user's own file {section.file.name}", load_set(section.file)
        (questions, told), origin = _turns(section, loaded.questions), loaded.source
        notes = tuple(f"Section {section.name}: {note}" for note in (loaded.note, told) if note)
    if section.count is not None and section.harness is None:
        questions = drawn(questions, section.count, section.seed, origin)
    part = Part(
        name=section.name,
        kind=section.kind,
        title=section.title or title,
        source=terms,
        questions=tuple(questions),
        plain=tuple(originals.get(question.prompt, question.prompt) for question in questions),
        scorers=section.scorers,
        likelihood=section.likelihood,
        grade=section.grade,
        harness=section.harness,
    )
    return part, notes


def _turns(section: Section, questions: Sequence[Question]) -> tuple[list[Question], str | None]:
    """Leave out second questions where no judge could tell of answers to them, and say so."""
    if section.grade or all(question.follow_up is None for question in questions):
        return [*questions], None
    told = (
        "of each conversation the first question alone is asked. The second is where answers are graded "
        "(`grade: true`)."
    )
    return [replace(question, follow_up=None) for question in questions], told


def builtin_questions(name: Builtin, count: int | None, seed: int) -> list[Question]:
    """List all questions of a set that comes with deltaguard, in its order.

    Args:
        name: of the set.
        count: how many are wanted of the generated task; other sets are given whole.
        seed: of the generated task.
    """
    if name == "task":
        examples = task_examples("test", count or _TASK_EXAMPLES, seed=seed)
        return [Question(each.prompt, each.system, expected=each.response) for each in examples]
    if name == "translated":
        return [row.question for language in LANGUAGES for row in translated_prompts(language)]
    if name == "attack":
        return [Question(row.prompt) for row in harmful_prompts("attack")]
    if name == "unseen-attack":
        return [Question(row.prompt) for row in unseen_harmful()]
    if name == "unseen-harmless":
        return [Question(row.prompt) for row in unseen_harmless()]
    rows = harmless_prompts("evaluation") if name == "harmless" else general_prompts()
    return [Question(row.prompt, expected=row.answer) for row in rows]


def resolve(suite: Suite, engine: EngineName = "transformers") -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Find all parts of a suite, with their prompts.

    Args:
        suite: as it was read.
        engine: what will answer; packages are asked for that it needs for what it can do (see `fit`).

    Returns:
        The parts in the suite's order, and a note for each optional section that cannot be had and for rows
        of data that were left out.

    Raises:
        DeltaguardError: prompts are missing, or a scorer or probe is unknown or cannot run; everything that
            is wrong is named, with how to mend it.
    """
    parts: list[Part] = []
    notes: list[str] = []
    problems: list[str] = []
    for section in suite.sections:
        try:
            _check(section, engine)
            found, known = find_prompts(section)
            parts += _variants(section, found, suite.decoding)
            notes += known
        except DeltaguardError as error:
            if section.optional:
                notes.append(f"Section {section.name} was skipped: {error}")
            else:
                problems.append(f"- {section.name}: {error}")
    if problems:
        raise DeltaguardError(
            f"{len(problems)} of {len(suite.sections)} sections of the suite {suite.name} cannot run:\n"
            + "\n".join(problems)
            + "\nMend them, remove them from a copy of the suite, or mark them `optional: true`."
        )
    if not parts:
        raise DeltaguardError(f"No section of the suite {suite.name} can run:\n" + "\n".join(notes))
    return tuple(parts), tuple(notes)


def _check(section: Section, engine: EngineName) -> None:
    """Find now, and not after an hour of answers, what a section names that is unknown or not installed."""
    for what, given, known in (("scorer", section.scorers, SCORERS), ("probe", section.probes, PROBES)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise DeltaguardError(f"there is no {what} {', '.join(unknown)}; there are {', '.join(known)}.")
    for option, (modules, extra) in _NEEDED.items():
        if getattr(section, option) is not None and engine in _ENGINES[option]:
            require_packages(option, extra, *modules)
    if section.gcg is not None and engine in _ENGINES["gcg"]:
        require_nanogcg()
    if section.second_attack is not None:
        attack_conversations(section.second_attack.count, seed=section.second_attack.seed)
    for name in section.scorers:
        # A scorer knows which library it lacks.
        SCORERS[name]("1", "1")


def _variants(section: Section, found: Part, decoding: Decoding) -> list[Part]:
    """Say how answers to a section's prompts are drawn, and add the other ways of asking."""
    lacking = sum(not (question.expected or "").strip() for question in found.questions)
    if lacking and (found.scorers or found.likelihood):
        raise DeltaguardError(
            f"{lacking} of {len(found.questions)} prompts have no expected answer, which its scorers or "
            "likelihood need."
        )
    for name in found.scorers:
        # Now, and not after hours of answers: an expected answer may be none for its scorer.
        for question in found.questions:
            if SCORERS[name]("", question.expected or ""):
                raise DeltaguardError(
                    f"to {name} an empty answer is like the expected one {question.expected!r}: correct it."
                )
    if section.max_new_tokens is not None:
        decoding = replace(decoding, max_new_tokens=section.max_new_tokens)
    generates = section.kind != "utility" or section.scorers or section.grade
    plain = replace(found, decoding=decoding if generates else None)

    def variant(name: str, title: str = "", **changed: Any) -> Part:
        # Probes and attacks are about refusals alone.
        named = {"name": f"{plain.name}/{name}", "title": f"{plain.title} ({title or name})"}
        return replace(plain, likelihood=False, **named, **changed)

    parts = [plain]
    parts += [
        variant(name, questions=tuple(PROBES[name](question) for question in plain.questions))
        for name in section.probes
    ]
    if section.second_attack is not None:
        title = f"second attack, {section.second_attack.count} examples"
        parts.append(variant(SECOND_ATTACK, title, second_attack=section.second_attack))
    if section.gcg is not None:
        count = section.gcg.count
        parts.append(
            variant("gcg", questions=plain.questions[:count], plain=plain.plain[:count], gcg=section.gcg)
        )
    return parts


def fit(
    parts: Sequence[Part], engine: EngineName, *, max_perplexity: float | None = None
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Keep the parts that an engine can run, and note each thing that it cannot.

    A server shows neither weights nor probabilities of given answers, and takes no beginning of an answer;
    vLLM generates alone.

    Raises:
        DeltaguardError: nothing is left.
    """
    kept: list[Part] = []
    notes: list[str] = []
    for part in parts:
        reason = _unfit(part, engine)
        if reason:
            notes.append(f"Section {part.name} was skipped: the {engine} engine {reason}.")
            continue
        if part.likelihood and engine != "transformers":
            notes.append(
                f"Likelihoods of section {part.name} were skipped: the {engine} engine does not give them."
            )
            if part.decoding is None:
                continue
        kept.append(replace(part, likelihood=part.likelihood and engine == "transformers"))
    if not kept:
        raise DeltaguardError(f"The {engine} engine can run no section of this suite:\n" + "\n".join(notes))
    judged = any(part.kind != "utility" for part in kept)
    if max_perplexity is not None and engine != "transformers" and judged:
        notes.append(
            f"max_perplexity {max_perplexity:g} was left out: the {engine} engine gives no perplexity. "
            "Answers are found incoherent by their form alone."
        )
    return tuple(kept), tuple(notes)


def _unfit(part: Part, engine: EngineName) -> str | None:
    told = {
        "gcg": "cannot run GCG, which needs the model itself",
        "harness": "cannot run the harness, which needs the model itself",
        "second_attack": "cannot fine-tune a model",
    }
    for option, reason in told.items():
        if getattr(part, option) is not None and engine not in _ENGINES[option]:
            return reason
    if engine == "openai" and any(question.prefill for question in part.questions):
        return "cannot be given the beginning of an answer"
    return None
