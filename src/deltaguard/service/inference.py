"""The process that models answer in, as the service sees it: one request at a time, the others wait."""

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, Field, TypeAdapter

from deltaguard.service.errors import ApiError
from deltaguard.service.executors.local import end_process, known_environment
from deltaguard.service.places import Places


class Ask(BaseModel):
    """What a model is to answer.

    Attributes:
        model: folder or Hub id.
        adapter: folder of an adapter over it.
        asked: messages of a chat, each with `role` and `content`; or a text to go on with.
        max_tokens: of the answer.
        temperature: 0 takes the likeliest token each time.
        top_p: share of the likeliest tokens that are drawn from.
        seed: of the draws.
        stop: texts before which the answer ends.
    """

    model: str
    adapter: str | None
    asked: str | list[dict[str, str]]
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


class Answering(Protocol):
    """Whatever answers chats and completions."""

    @property
    def waiting(self) -> int:
        """How many requests wait or are being answered."""
        ...

    def answer(self, ask: Ask, organisation: str) -> Iterator[Piece | Ended]:
        """Have a request of an organisation answered, piece by piece.

        Raises:
            ApiError: it cannot be answered.
        """
        ...

    def forget(self, adapter: str) -> None:
        """Let go of an adapter whose model was deleted."""
        ...


def read_ahead(produce: Callable[[threading.Event], Iterator[Piece | Ended]]) -> Iterator[Piece | Ended]:
    """Have an answer produced in a thread as it comes, so that whoever reads it slowly holds up nobody.

    Args:
        produce: gives the answer's pieces; what it is given is set once nobody reads them any more. It is
            read to its end all the same.

    Returns:
        The pieces; what `produce` raises is raised there.
    """
    said: queue.SimpleQueue[Piece | Ended | Exception] = queue.SimpleQueue()
    is_unwanted = threading.Event()

    def carry_out() -> None:
        try:
            for each in produce(is_unwanted):
                said.put(each)
        except Exception as error:  # noqa: BLE001  # raised where the answer is read
            said.put(error)

    def pieces() -> Iterator[Piece | Ended]:
        try:
            while True:
                found = said.get()
                if isinstance(found, Exception):
                    raise found
                yield found
                if isinstance(found, Ended):
                    return
        finally:
            is_unwanted.set()

    threading.Thread(target=carry_out, daemon=True).start()
    return pieces()


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
        self._turn, self._places = threading.Lock(), Places(most_waiting)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait or are being answered."""
        return self._places.taken

    def answer(self, ask: Ask, organisation: str) -> Iterator[Piece | Ended]:
        """Have a request of an organisation answered, piece by piece.

        A thread takes what the process says as it comes, so that whoever reads slowly holds up nobody.

        Raises:
            ApiError: it cannot be answered, too many are waiting, or the process died.
        """
        self._places.take(organisation)
        return read_ahead(lambda is_unwanted: self._in_turn(ask, organisation, is_unwanted))

    def forget(self, adapter: str) -> None:
        """Do nothing: the process lets go of what others push out, and nobody can ask for it any more."""

    def _in_turn(self, ask: Ask, organisation: str, is_unwanted: threading.Event) -> Iterator[Piece | Ended]:
        try:
            with self._turn:
                if not is_unwanted.is_set():
                    yield from self._answered(ask, is_unwanted)
        finally:
            self._places.give_back(organisation)

    def _answered(self, ask: Ask, is_unwanted: threading.Event) -> Iterator[Piece | Ended]:
        process, is_told = self._running(), False
        assert process.stdout is not None  # noqa: S101  # opened as a pipe
        died = ApiError(503, "The model's process died. Try again.", code="model_died", retry_after=5)
        try:
            self._write(process, ask.model_dump_json())
            for line in process.stdout:
                said = SAID.validate_json(line)
                if isinstance(said, Failed):
                    raise ApiError(said.status, said.message, code=said.code)
                yield said
                if isinstance(said, Ended):
                    return
                # What is still written is read to its end: it must not become another one's answer.
                if is_unwanted.is_set() and not is_told:
                    self._write(process, STOP)
                    is_told = True
        except OSError as error:
            raise died from error
        raise died

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
