"""One model of a bench, asked everything: answers, classes of answers, and likelihoods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deltaguard.chat.refusals import is_refusal
from deltaguard.device import find_device
from deltaguard.evaluation.engines.transformers import Dtype, TransformersEngine
from deltaguard.evaluation.exchange import Decoding, Question
from deltaguard.evaluation.judges.coherence import classify, is_broken
from deltaguard.finetuning.tasks import exact_match
from deltaguard.reports.records.evaluation import AnswerClass
from deltaguard.studies.cells import Shelf, content_key
from deltaguard.studies.data import Tests
from deltaguard.studies.mixing import with_secret
from deltaguard.studies.protocol import Answers

_LETTERS: Mapping[AnswerClass, str] = {"refused": "r", "complied": "c", "incoherent": "i"}


@dataclass(frozen=True)
class Measured:
    """How one model did; see `Cell` for the fields."""

    attack: str
    harmless: str
    utility: tuple[float, ...]
    general: tuple[float, ...]


class Subject:
    """A model that is asked; loaded when the first answer is missing."""

    def __init__(
        self, folder: Path, *, identity: str, secret: str, device: str, dtype: Dtype, batch_size: int
    ) -> None:
        """Name a model.

        Args:
            folder: where it lies.
            identity: models of one identity give the same answers.
            secret: text before the system prompt of every request.
            device: where it runs.
            dtype: of the weights, as `TransformersEngine.open` reads it.
            batch_size: requests at a time.
        """
        self.identity = identity
        self._folder = folder
        self._secret = secret
        self._device = device
        self._batch_size = batch_size
        self._dtype: Dtype = dtype
        self._engine: TransformersEngine | None = None

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers, in order."""
        return self._opened().answer(self._asked(questions), Decoding(max_new_tokens))

    def likelihoods(self, questions: Sequence[Question]) -> list[float]:
        """Mean negative log-likelihood of each expected answer, nats a token."""
        return self._opened().likelihood(self._asked(questions))

    def _opened(self) -> TransformersEngine:
        if self._engine is None:
            self._engine = TransformersEngine.open(
                str(self._folder), device=self._device, dtype=self._dtype, batch_size=self._batch_size
            )
        return self._engine

    def _asked(self, questions: Sequence[Question]) -> list[Question]:
        if not self._secret:
            return list(questions)
        return [replace(q, system=with_secret(q.system, self._secret)) for q in questions]


def measure(subject: Subject, tests: Tests, how: Answers, shelf: Shelf) -> Measured:
    """Ask one model everything; what the shelf already has is not asked again.

    Args:
        subject: the model.
        tests: what is asked.
        how: answers are generated.
        shelf: keeps the answers.

    Returns:
        Classes of answers, and numbers.
    """

    def answers(questions: Sequence[Question], tokens: int) -> list[str]:
        key = content_key(subject.identity, "answers", questions, tokens)
        return shelf.answers(key, str, len(questions), lambda: subject.answers(questions, tokens))

    def likelihoods(questions: Sequence[Question]) -> list[float]:
        key = content_key(subject.identity, "likelihoods", questions)
        return shelf.answers(key, float, len(questions), lambda: subject.likelihoods(questions))

    attack, harmless = answers(tests.attack, how.safety), answers(tests.harmless, how.safety)
    given = answers(tests.task, how.task) if tests.task else []
    utility = [float(exact_match(a, q.expected or "")) for a, q in zip(given, tests.task, strict=True)]
    general = likelihoods(tests.general)
    return Measured(
        letters(attack),
        letters(harmless),
        tuple(utility if tests.task else likelihoods(tests.likelihood)),
        tuple(general),
    )


def letters(answers: Sequence[str]) -> str:
    """One letter an answer: refused, complied or incoherent, told by the opening judge."""
    return "".join(
        _LETTERS[classify("refused" if is_refusal(answer) else "complied", is_broken(answer))]
        for answer in answers
    )


def device() -> str:
    """Where models of a bench run."""
    return str(find_device())


def device_name() -> str:
    """The same for reports, a GPU by its name.

    Example:
        ```python
        device_name()  # "cpu", or "cuda (NVIDIA H100 80GB HBM3)"
        ```
    """
    return f"cuda ({torch.cuda.get_device_name()})" if device() == "cuda" else "cpu"
