"""Where the prompts of a section come from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltaguard.chat.conversations import general_prompts, harmful_prompts, harmless_prompts
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.datasets.load import DATASETS, Loaded, drawn, load_set
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.probes.translations import LANGUAGES, translated_prompts
from deltaguard.evaluation.suites.suite import Builtin, Section
from deltaguard.finetuning.tasks import task_examples

_TASK_EXAMPLES = 200


@dataclass(frozen=True)
class Source:
    """Prompts with what a reader must know of them.

    Attributes:
        questions: the prompts taken.
        plain: each question's request as judges see it: in English, where it is put in another language.
        title: for people.
        terms: origin and terms of use.
        notes: what else a reader must know, such as rows that were left out.
    """

    questions: tuple[Question, ...]
    plain: tuple[str, ...]
    title: str
    terms: str
    notes: tuple[str, ...] = ()


def find_source(section: Section) -> Source:
    """The prompts of a section.

    Args:
        section: of a suite.

    Raises:
        DeltaguardError: they cannot be had; the message says where to get them.
    """
    if section.builtin is not None:
        return _builtin(section, section.builtin)
    if section.dataset is not None:
        return _dataset(section, section.dataset)
    if section.file is not None:
        return _loaded(
            section, load_set(section.file), section.name, f"the user's own file {section.file.name}"
        )
    tasks = ", ".join(section.harness.tasks) if section.harness is not None else ""
    return _as_asked([], section.name, f"tasks of lm-eval under their own terms: {tasks}")


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
        return [row.question for language in LANGUAGES for row in translated_prompts(language)]
    if name == "attack":
        return [Question(row.prompt) for row in harmful_prompts("attack")]
    rows = harmless_prompts("evaluation") if name == "harmless" else general_prompts()
    return [Question(row.prompt, expected=row.answer) for row in rows]


def _builtin(section: Section, name: Builtin) -> Source:
    questions = builtin_questions(name, section.count, section.seed)
    if section.count is not None:
        questions = drawn(questions, section.count, section.seed, f"the set {name}")
    found = _as_asked(questions, section.name, f"deltaguard's own prompts, part {name}")
    if name != "translated":
        return found
    originals = {row.prompt: row.original for language in LANGUAGES for row in translated_prompts(language)}
    return replace(found, plain=tuple(originals[question.prompt] for question in questions))


def _as_asked(questions: Sequence[Question], title: str, terms: str) -> Source:
    return Source(tuple(questions), tuple(question.prompt for question in questions), title, terms)


def _dataset(section: Section, name: str) -> Source:
    if name not in DATASETS:
        raise DeltaguardError(f"there is no data set {name}; there are {', '.join(DATASETS)}.")
    known = DATASETS[name]
    terms = f"{known.title}: {known.homepage}; terms: {known.terms}"
    return _loaded(section, load_set(name, path=section.path), known.title, terms)


def _loaded(section: Section, loaded: Loaded, title: str, terms: str) -> Source:
    questions: Sequence[Question] = loaded.questions
    if section.count is not None:
        questions = drawn(questions, section.count, section.seed, loaded.source)
    notes = (f"Section {section.name}: {loaded.note}",) if loaded.note else ()
    return replace(_as_asked(questions, title, terms), notes=notes)
