"""Answers from a server that speaks OpenAI's chat completions, such as vLLM, llama.cpp or a paid service."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Answer, Decoding, OnBatch, Question
from deltaguard.evaluation.server import Server


@dataclass(frozen=True)
class OpenAIEngine:
    """A model on a server.

    The server applies its own chat template, which cannot be seen from here, and a beginning of the answer
    cannot be given. How a seed is used is up to the server.

    Attributes:
        server: where the model is, and how it is asked.
    """

    server: Server

    def answer(
        self, questions: Sequence[Question], decoding: Decoding, *, on_batch: OnBatch | None = None
    ) -> list[Answer]:
        """Answer each question, in order, or say why the server did not.

        Args:
            questions: what is asked.
            decoding: how answers are drawn.
            on_batch: called with one answer at a time as they come.

        Raises:
            DeltaguardError: a question has a prefill.
        """
        if any(question.prefill for question in questions):
            raise DeltaguardError(
                "A server for chat completions cannot be given the beginning of an answer (prefill)."
            )
        answers: dict[int, Answer] = {}
        with closing(self.server.ask([_request(question, decoding) for question in questions])) as replies:
            for i, reply in replies:
                answers[i] = reply
                if on_batch is not None:
                    on_batch([i], [reply])
        return [answers[i] for i in range(len(questions))]

    def close(self) -> None:
        """Do nothing: no connection outlives `answer`."""


def _request(question: Question, decoding: Decoding) -> dict[str, Any]:
    turns = [("system", question.system)] if question.system is not None else []
    if question.earlier is not None:
        turns += [("user", question.earlier.prompt), ("assistant", question.earlier.answer)]
    turns.append(("user", question.prompt))
    return {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed,
    }
