"""Chat with aligned and published models, whole or in a stream of server-sent events."""

import time
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from deltaguard.service.context import Asking, Open
from deltaguard.service.database import new_id
from deltaguard.service.errors import ApiError, envelope
from deltaguard.service.inference import Ask, Ended, Inference, Piece
from deltaguard.service.models import find_folders
from deltaguard.service.schemas import Given, Text

router = APIRouter(prefix="/v1/chat", tags=["chat"])


class _TextPart(Given):
    type: Literal["text"]
    text: Text


class ChatMessage(Given):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[_TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        parts = self.content if isinstance(self.content, list) else []
        text = "\n".join(part.text for part in parts) if parts else self.content
        return {"role": "system" if self.role == "developer" else self.role, "content": str(text)}


class StreamOptions(Given):
    """What a stream tells beside its text."""

    include_usage: bool = False


class CreateChat(Given):
    """What a model is asked; what the service cannot do is refused, not left out."""

    model: Annotated[Text, Field(max_length=300)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
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


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What an assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """An answer; there is one."""

    index: Literal[0] = 0
    message: Answer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatObject(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


@router.post("/completions", response_model=ChatObject)
def create_chat(service: Open, caller: Asking, request: Request, asked: CreateChat) -> Any:
    """Answer a chat."""
    folders = find_folders(service, caller, asked.model)
    most = service.settings.limits.chat_tokens
    tokens = asked.max_completion_tokens or asked.max_tokens or most
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    inference: Inference = request.app.state.inference
    found = inference.answer(
        Ask(
            model=folders.model,
            adapter=folders.adapter,
            messages=[message.plain for message in asked.messages],
            max_tokens=min(tokens, most),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=asked.top_p or 1.0,
            seed=asked.seed,
            stop=tuple(stop),
        )
    )
    # Nothing is sent before the first piece, so that what goes wrong until then has its own status.
    first = next(found)
    head: dict[str, Any] = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": asked.model}
    pieces = chain([first], found)
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_stream(head, pieces, usage=usage), media_type="text/event-stream")
    text, ended = "", Ended(finish_reason="stop", prompt_tokens=0, completion_tokens=0)
    for piece in pieces:
        if isinstance(piece, Ended):
            ended = piece
        else:
            text += piece.text
    choice = Choice(message=Answer(content=text), finish_reason=ended.finish_reason)
    return ChatObject(**head, choices=[choice], usage=_usage(ended))


def _stream(head: dict[str, Any], pieces: Iterator[Piece | Ended], *, usage: bool) -> Iterator[str]:
    head = {**head, "object": "chat.completion.chunk"}
    none = {"usage": None} if usage else {}

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**head, "choices": [choice], **none})

    yield chunk({"role": "assistant", "content": ""})
    try:
        for piece in pieces:
            if isinstance(piece, Piece):
                yield chunk({"content": piece.text})
                continue
            yield chunk({}, piece.finish_reason)
            if usage:
                yield _event({**head, "choices": [], "usage": _usage(piece).model_dump()})
    except ApiError as error:
        # The status is sent already; clients read the error from the stream.
        yield _event(envelope(error.status, error.message, code=error.code))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {bytes(JSONResponse(content).body).decode()}\n\n"


def _usage(ended: Ended) -> Usage:
    read, written = ended.prompt_tokens, ended.completion_tokens
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
