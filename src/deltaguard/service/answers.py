"""What chats and completions have in common: how an answer is drawn, and how it is sent."""

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from deltaguard.service.database import new_id
from deltaguard.service.errors import ApiError, envelope, known_failure
from deltaguard.service.inference import Answering, Ask, Ended, Piece
from deltaguard.service.models import Folders
from deltaguard.service.schemas import Given, Text

_LOGGER = logging.getLogger(__name__)


class StreamOptions(Given):
    """What a stream tells beside its text."""

    include_usage: bool = False


class Sampled(Given):
    """How an answer is drawn; what the service cannot do is refused, not left out."""

    model: Annotated[Text, Field(max_length=300)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the tokens that were read and written."""
        return self.stream_options is not None and self.stream_options.include_usage

    def ask(
        self, folders: Folders, asked: str | Sequence[dict[str, str]], *, tokens: int | None, most: int
    ) -> Ask:
        """Write what the model's process is asked.

        Args:
            folders: of the model.
            asked: messages of a chat, or a text to go on with.
            tokens: of the answer, as many as the service allows where None.
            most: what the service allows.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Ask(
            model=folders.model,
            adapter=folders.adapter,
            asked=asked if isinstance(asked, str) else list(asked),
            max_tokens=min(tokens or most, most),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            seed=self.seed,
            stop=tuple(stop),
        )


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage_of(answers: Sequence[Ended]) -> Usage:
    """Sum the tokens of answers."""
    read = sum(each.prompt_tokens for each in answers)
    written = sum(each.completion_tokens for each in answers)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def begun(inference: Answering, ask: Ask, organisation: str) -> Iterator[Piece | Ended]:
    """Have a request answered, and wait for the first piece: what goes wrong until then has its own status.

    Raises:
        ApiError: as `Inference.answer`.
    """
    found = inference.answer(ask, organisation)
    return chain([next(found)], found)


def whole(pieces: Iterator[Piece | Ended]) -> tuple[str, Ended]:
    """Put an answer together.

    Returns:
        Its text, and how it ended.
    """
    text = ""
    for piece in pieces:
        if isinstance(piece, Ended):
            return text, piece
        text += piece.text
    raise AssertionError("every answer has an end")


def head_of(kind: str, model: str) -> dict[str, Any]:
    """Make what all parts of an answer begin with."""
    return {"id": new_id(kind), "created": int(time.time()), "model": model}


def as_events(parts: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Write parts of an answer as server-sent events.

    Clients read an error from the stream, whose status was sent before.
    """
    try:
        for part in parts:
            yield _event(part)
    except Exception as error:
        found = known_failure(error)
        if found is None:
            _LOGGER.exception("A bug, while an answer was written")
            found = ApiError(
                500, "This is a bug of the service. Its operator finds it in the log.", code="bug"
            )
        yield _event(envelope(found.status, found.message, code=found.code))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {bytes(JSONResponse(content).body).decode()}\n\n"
