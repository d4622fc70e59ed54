"""Texts that aligned and published models go on with, without a chat template."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from deltaguard.service.answers import Sampled, Usage, as_events, begun, head_of, usage_of, whole
from deltaguard.service.context import Asking, Open
from deltaguard.service.inference import Ended, Piece
from deltaguard.service.models import find_folders
from deltaguard.service.schemas import Text

router = APIRouter(prefix="/v1/completions", tags=["completions"])

_TOKENS = 16
"""Of an answer where the request does not say, as OpenAI has it."""

_MOST_PROMPTS = 16


class CreateCompletion(Sampled):
    """Texts to go on with."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=_MOST_PROMPTS)]

    @property
    def prompts(self) -> list[str]:
        """The texts, also where there is one."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Continuation(BaseModel):
    """What follows on one of the texts."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class CompletionObject(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Continuation]
    usage: Usage


@router.post("", response_model=CompletionObject)
def create_completion(service: Open, caller: Asking, request: Request, asked: CreateCompletion) -> Any:
    """Go on with one text or several, one after the other."""
    folders, inference = find_folders(service, caller, asked.model), request.app.state.inference
    most, tokens = service.settings.limits.chat_tokens, asked.max_tokens or _TOKENS
    asks = [asked.ask(folders, text, tokens=tokens, most=most) for text in asked.prompts]
    head = head_of("cmpl", asked.model)
    first = begun(inference, asks[0], caller.organisation)

    def answers() -> Iterator[Iterator[Piece | Ended]]:
        yield first
        yield from (begun(inference, ask, caller.organisation) for ask in asks[1:])

    if asked.stream:
        parts = _parts(head, answers(), usage=asked.tells_usage)
        return StreamingResponse(as_events(parts), media_type="text/event-stream")
    found = [whole(pieces) for pieces in answers()]
    choices = [
        Continuation(index=index, text=text, finish_reason=ended.finish_reason)
        for index, (text, ended) in enumerate(found)
    ]
    return CompletionObject(**head, choices=choices, usage=usage_of([ended for _, ended in found]))


def _parts(
    head: dict[str, Any], answers: Iterator[Iterator[Piece | Ended]], *, usage: bool
) -> Iterator[dict[str, Any]]:
    head = {**head, "object": "text_completion"}
    none = {"usage": None} if usage else {}
    ends: list[Ended] = []
    for index, pieces in enumerate(answers):
        for piece in pieces:
            is_end = isinstance(piece, Ended)
            choice = {
                "index": index,
                "text": "" if is_end else piece.text,
                "finish_reason": piece.finish_reason if is_end else None,
                "logprobs": None,
            }
            ends += [piece] if is_end else []
            yield {**head, "choices": [choice], **none}
    if usage:
        yield {**head, "choices": [], "usage": usage_of(ends).model_dump()}
