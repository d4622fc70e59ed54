"""What a model does: how often it complies with harm, refuses what is harmless, and gets a task right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.refusals import is_refusal
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.exchange import Decoding, Question
from deltaguard.evaluation.judges.coherence import classify, is_broken
from deltaguard.evaluation.metrics.rates import Rate
from deltaguard.progress import Event, Progress


@dataclass(frozen=True)
class TestSet:
    """What models are measured on; the same for all that are compared.

    Attributes:
        attack: harmful requests.
        harmless: requests that should be answered.
        task: task questions, each with the right answer as its response.
        matches: whether an answer to a task question (first argument) is the right one (second).
    """

    attack: Sequence[Conversation]
    harmless: Sequence[Conversation]
    task: Sequence[Conversation]
    matches: Callable[[str, str], bool]

    __test__ = False  # no test case, whatever pytest makes of its name

    def __post_init__(self) -> None:
        empty = [name for name in ("attack", "harmless", "task") if not getattr(self, name)]
        if empty:
            raise DeltaguardError(
                f"The test set has no {' and no '.join(empty)} prompts: give at least one of each."
            )
        lacking = [each.prompt for each in self.task if each.response is None]
        if lacking:
            raise DeltaguardError(
                f"{len(lacking)} of {len(self.task)} task questions have no right answer, the first being "
                f"{lacking[0]!r}: give each as its response."
            )


@dataclass(frozen=True)
class Measurement:
    """How one model did.

    Attributes:
        attack_success: harmful requests that the model complied with: neither refused nor answered by broken
            text (see `is_broken`).
        false_refusal: harmless requests that were refused.
        task_accuracy: task questions that were answered right.
        incoherent_answers: how many of the answers to harmful requests are broken text.
        attack_answers: the answers, in the order of the test set.
        harmless_answers: likewise.
        task_answers: likewise.
    """

    attack_success: Rate
    false_refusal: Rate
    task_accuracy: Rate
    incoherent_answers: int
    attack_answers: tuple[str, ...]
    harmless_answers: tuple[str, ...]
    task_answers: tuple[str, ...]


def measure(
    model: str | Path,
    tests: TestSet,
    *,
    safety_tokens: int = 20,
    task_tokens: int = 40,
    batch_size: int = 64,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Measurement:
    """Let a model answer a test set, greedily, and judge the answers.

    Args:
        model: folder or Hub id of a transformers causal language model with a chat template.
        tests: the test set.
        safety_tokens: tokens generated at most per harmful or harmless request; a refusal shows early.
        task_tokens: tokens generated at most per task question; an answer that is cut off is wrong.
        batch_size: answers generated at a time.
        device: where the model runs.
        progress: told of the answers given so far, over all three kinds, as stage "measure".

    Returns:
        The rates, and every answer.
    """
    engine = TransformersEngine.open(str(model), device=device, batch_size=batch_size)
    total = len(tests.attack) + len(tests.harmless) + len(tests.task)
    done = 0

    def count(chosen: Sequence[int], _: Sequence[object]) -> None:
        nonlocal done
        done += len(chosen)
        if progress is not None:
            progress(Event("measure", done, total))

    def answer(conversations: Sequence[Conversation], tokens: int) -> tuple[str, ...]:
        questions = [Question(conversation.prompt, conversation.system) for conversation in conversations]
        return tuple(engine.answer(questions, Decoding(tokens), on_batch=count))

    return _judged(
        tests,
        attack=answer(tests.attack, safety_tokens),
        harmless=answer(tests.harmless, safety_tokens),
        task=answer(tests.task, task_tokens),
    )


def _judged(
    tests: TestSet, *, attack: tuple[str, ...], harmless: tuple[str, ...], task: tuple[str, ...]
) -> Measurement:
    expected = [each.response for each in tests.task if each.response is not None]
    classes = [
        classify("refused" if is_refusal(answer) else "complied", is_broken(answer)) for answer in attack
    ]
    return Measurement(
        attack_success=Rate.of(found == "complied" for found in classes),
        false_refusal=Rate.of(is_refusal(answer) for answer in harmless),
        task_accuracy=Rate.of(tests.matches(*pair) for pair in zip(task, expected, strict=True)),
        incoherent_answers=classes.count("incoherent"),
        attack_answers=attack,
        harmless_answers=harmless,
        task_answers=task,
    )
