"""The process that models answer in, as the service sees it: one request at a time, the others wait."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter

from deltaguard.service.errors import ApiError
from deltaguard.service.process import end_process, known_environment


class Ask(BaseModel):
    """What a model is to answer.

    Attributes:
        model: folder or Hub id.
        adapter: folder of an adapter over it.
        messages: each with `role` and `content`.
        max_tokens: of the answer.
        temperature: 0 takes the likeliest token each time.
        top_p: share of the likeliest tokens that are drawn from.
        seed: of the draws.
        stop: texts before which the answer ends.
    """

    model: str
    adapter: str | None
    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


class Piece(BaseModel):
    """Some text of an answer."""

    kind: Literal["piece"] = "piece"
    text: str


class Ended(BaseModel):
    """The end of an answer."""

    kind: Literal["ended"] = "ended"
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Failed(BaseModel):
    """Why there is no answer."""

    kind: Literal["failed"] = "failed"
    status: int
    code: str
    message: str


SAID: TypeAdapter[Piece | Ended | Failed] = TypeAdapter(
    Annotated[Piece | Ended | Failed, Field(discriminator="kind")]
)
STOP = "stop"
"""The line that ends an answer early."""


class Inference:
    """The process, begun when it is first needed and again after it died."""

    def __init__(self, log: Path, *, device: str, most_waiting: int) -> None:
        """Prepare.

        Args:
            log: a file for what the process prints.
            device: where models run.
            most_waiting: requests that wait at a time; more are refused.
        """
        self._log, self._device = log, device
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(most_waiting)
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, ask: Ask) -> Iterator[Piece | Ended]:
        """Have a request answered, piece by piece.

        Raises:
            ApiError: it cannot be answered, too many are waiting, or the process died.
        """
        if not self._places.acquire(blocking=False):
            message = "Too many chats are waiting. Try again."
            raise ApiError(503, message, code="overloaded", retry_after=2)
        try:
            with self._turn:
                yield from self._answered(ask)
        finally:
            self._places.release()

    def _answered(self, ask: Ask) -> Iterator[Piece | Ended]:
        process = self._running()
        assert process.stdin is not None  # noqa: S101  # opened as a pipe
        assert process.stdout is not None  # noqa: S101  # likewise
        has_ended = False
        try:
            self._write(process, ask.model_dump_json())
            for line in process.stdout:
                said = SAID.validate_json(line)
                has_ended = not isinstance(said, Piece)
                if isinstance(said, Failed):
                    raise ApiError(said.status, said.message, code=said.code)
                yield said
                if has_ended:
                    return
            has_ended = True
            raise ApiError(503, "The model's process died. Try again.", code="model_died", retry_after=5)
        except OSError as error:
            has_ended = True
            message = "The model's process died. Try again."
            raise ApiError(503, message, code="model_died", retry_after=5) from error
        finally:
            if not has_ended:
                # Whoever asked is gone: what is still written must not become another one's answer.
                self._write(process, STOP)
                while (line := process.stdout.readline()) and isinstance(SAID.validate_json(line), Piece):
                    pass

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._process is not None:
            end_process(self._process)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deltaguard.service.answering", self._device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=known_environment(),
                start_new_session=True,
            )
        return self._process

    @staticmethod
    def _write(process: subprocess.Popen[bytes], line: str) -> None:
        assert process.stdin is not None  # noqa: S101  # opened as a pipe
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
