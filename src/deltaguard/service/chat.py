"""Chat with aligned and published models, whole or in a stream of server-sent events."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from deltaguard.service.answers import Sampled, Usage, as_events, begun, head_of, usage_of, whole
from deltaguard.service.context import Asking, Open
from deltaguard.service.inference import Ended, Piece
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
    refusal: None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        parts = self.content if isinstance(self.content, list) else []
        text = "\n".join(part.text for part in parts) if parts else self.content
        return {"role": "system" if self.role == "developer" else self.role, "content": str(text)}


class CreateChat(Sampled):
    """What a model is asked."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


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
    ask = asked.ask(
        find_folders(service, caller, asked.model),
        [message.plain for message in asked.messages],
        tokens=asked.max_completion_tokens or asked.max_tokens,
        most=service.settings.limits.chat_tokens,
    )
    pieces = begun(request.app.state.inference, ask, caller.organisation)
    head = head_of("chatcmpl", asked.model)
    if asked.stream:
        parts = _parts(head, pieces, usage=asked.tells_usage)
        return StreamingResponse(as_events(parts), media_type="text/event-stream")
    text, ended = whole(pieces)
    choice = Choice(message=Answer(content=text), finish_reason=ended.finish_reason)
    return ChatObject(**head, choices=[choice], usage=usage_of([ended]))


def _parts(head: dict[str, Any], pieces: Iterator[Piece | Ended], *, usage: bool) -> Iterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    none = {"usage": None} if usage else {}

    def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return {**head, "choices": [choice], **none}

    yield chunk({"role": "assistant", "content": ""})
    for piece in pieces:
        if isinstance(piece, Piece):
            yield chunk({"content": piece.text})
            continue
        yield chunk({}, piece.finish_reason)
        if usage:
            yield {**head, "choices": [], "usage": usage_of([piece]).model_dump()}
