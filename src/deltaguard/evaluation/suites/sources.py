"""Where the prompts of a section come from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from deltaguard.calibration.conversations import HarmfulPart, harmful_prompts, harmless_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.datasets.load import load_questions
from deltaguard.evaluation.datasets.registry import DATASETS
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.suites.suite import Builtin, Section
from deltaguard.finetuning.mixtures import everyday_prompts
from deltaguard.finetuning.tasks import task_examples

_TASK_EXAMPLES = 200


@dataclass(frozen=True)
class Source:
    """Prompts with what a reader must know of them.

    Attributes:
        questions: the prompts taken.
        title: for people.
        terms: origin and terms of use.
    """

    questions: tuple[Question, ...]
    title: str
    terms: str


def find_source(section: Section) -> Source:
    """The prompts of a section.

    Args:
        section: of a suite.

    Raises:
        DeltaguardError: they cannot be had; the message says where to get them.
    """
    if section.builtin is not None:
        questions = _drawn(builtin_questions(section.builtin, section.count, section.seed), section)
        return Source(questions, section.name, f"deltaguard's own prompts, part {section.builtin}")
    if section.dataset is not None:
        return _dataset(section, section.dataset)
    if section.file is not None:
        loaded = load_questions(str(section.file), count=section.count, seed=section.seed)
        return Source(tuple(loaded), section.name, f"the user's own file {section.file.name}")
    tasks = ", ".join(section.harness.tasks) if section.harness is not None else ""
    return Source((), section.name, f"tasks of lm-eval under their own terms: {tasks}")


def builtin_questions(name: Builtin, count: int | None, seed: int) -> list[Question]:
    """All questions of a set that comes with deltaguard, in its order.

    Args:
        name: of the set.
        count: how many are wanted of the generated task; other sets are given whole.
        seed: of the generated task.
    """
    if name == "task":
        examples = task_examples("test", count or _TASK_EXAMPLES, seed=seed)
        conversations = [example.conversation for example in examples]
        return [Question(c.prompt, system=c.system, expected=c.response) for c in conversations]
    if name == "translated":
        text = (files("deltaguard") / "data" / "translated_prompts.jsonl").read_text(encoding="utf-8")
        return [Question(json.loads(line)["prompt"]) for line in text.split("\n") if line]
    if name in {"harmless", "everyday"}:
        rows = harmless_prompts("evaluation") if name == "harmless" else everyday_prompts()
        return [Question(row.prompt, expected=row.answer) for row in rows]
    part: HarmfulPart = "attack" if name == "attack" else "dial"
    return [Question(row.prompt) for row in harmful_prompts(part)]


def _drawn(questions: Sequence[Question], section: Section) -> tuple[Question, ...]:
    """As many as asked for, in their order; the seed fixes which."""
    if section.count is not None and section.count > len(questions):
        raise DeltaguardError(
            f"{section.count} prompts were asked for and the set {section.builtin} has {len(questions)}. "
            "Lower `count`, or leave it out for all."
        )
    ranked = sorted(range(len(questions)), key=lambda i: _rank(section.seed, i, questions[i].prompt))
    return tuple(questions[i] for i in sorted(ranked[: section.count]))


def _rank(seed: int, index: int, prompt: str) -> str:
    return sha256(f"{seed} {index} {prompt}".encode()).hexdigest()


def _dataset(section: Section, name: str) -> Source:
    if name not in DATASETS:
        raise DeltaguardError(f"there is no data set {name}; there are {', '.join(DATASETS)}.")
    known = DATASETS[name]
    loaded = load_questions(name, path=section.path, count=section.count, seed=section.seed)
    return Source(tuple(loaded), known.title, f"{known.title}: {known.homepage}; terms: {known.terms}")
