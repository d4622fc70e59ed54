"""Answers from a server that speaks OpenAI's chat completions, such as vLLM, llama.cpp or a paid service."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.address import public_address
from deltaguard.evaluation.exchange import Decoding, OnBatch, Question


@dataclass
class OpenAIEngine:
    """A model on a server.

    The server applies its own chat template, which cannot be seen from here, and a beginning of the answer
    cannot be given. How a seed is used is up to the server.

    Attributes:
        base_url: such as `http://127.0.0.1:8000/v1`.
        model: its name there.
        api_key_env: the environment variable that holds the key. Servers that need none are content with any.
        workers: requests at a time.
        retries: how often a request that fails by the network or the server is sent again.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    workers: int = 8
    retries: int = 4
    _client: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise DeltaguardError(
                "The openai engine needs the openai package: pip install 'deltaguard[eval]'."
            ) from error
        self._client = OpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(self.api_key_env, "none"),
            max_retries=self.retries,
        )

    def answer(
        self, questions: Sequence[Question], decoding: Decoding, *, on_batch: OnBatch | None = None
    ) -> list[str]:
        """One answer a question, in order; `on_batch` is called with one answer at a time as they come.

        Raises:
            DeltaguardError: a question has a prefill, or the server fails, retries included.
        """
        if any(question.prefill for question in questions):
            raise DeltaguardError(
                "A server for chat completions cannot be given the beginning of an answer (prefill)."
            )
        answers = [""] * len(questions)
        with ThreadPoolExecutor(self.workers) as pool:
            asked = {pool.submit(self._ask, question, decoding): i for i, question in enumerate(questions)}
            try:
                for done in as_completed(asked):
                    i = asked[done]
                    answers[i] = done.result()
                    if on_batch is not None:
                        on_batch([i], [answers[i]])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return answers

    def _ask(self, question: Question, decoding: Decoding) -> str:
        from openai import OpenAIError

        system = [{"role": "system", "content": question.system}] if question.system is not None else []
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[*system, {"role": "user", "content": question.prompt}],
                max_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                seed=decoding.seed,
            )
        except OpenAIError as error:
            raise DeltaguardError(
                f"The server at {public_address(self.base_url)} did not answer for model {self.model!r}, "
                f"{self.retries} retries included: {error}. Answers so far are kept: run the same command "
                "again."
            ) from error
        return _text(reply.choices[0].message) if reply.choices else ""

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _text(message: Any) -> str:
    """What the model said; some services put a refusal beside an empty content."""
    content: str = (message.content or "").strip()
    return content or (message.refusal or "").strip()
