"""The chat box: one message, answered by the aligned and the restored model side by side."""

from dataclasses import dataclass

from fastapi import Request

from deltaguard.service.chat import ChatMessage, CreateChat, create_chat
from deltaguard.service.context import Caller, Service
from deltaguard.service.errors import ApiError
from deltaguard.service.models import find_model

LONGEST_MESSAGE = 8000
"""Characters."""

_LONGEST_ANSWER = 256


@dataclass(frozen=True)
class Said:
    """What a model said.

    Attributes:
        role: `aligned`, `finetuned` or `restored`.
        name: by which it was asked; empty where nobody can ask it.
        text: its answer, or why there is none.
        is_answer: which of both the text is.
    """

    role: str
    name: str
    text: str
    is_answer: bool


def answers_of(
    service: Service, caller: Caller, request: Request, name: str, message: str
) -> tuple[Said, ...]:
    """Ask a model and the aligned one that it is over; of an aligned one itself alone.

    Args:
        service: the service.
        caller: who is asking.
        request: of the page, whose application has the models.
        name: of the model.
        message: at least one character.

    Raises:
        ApiError: there is no such model for them.
    """
    if name in service.settings.models:
        return (_said(service, caller, request, "aligned", name, message),)
    with service.sessions.reading() as session:
        base = find_model(session, caller, name).base
    return (
        _said(service, caller, request, "aligned", base, message),
        Said("finetuned", "", "As it was before the restore it is not kept, and cannot be asked.", False),
        _said(service, caller, request, "restored", name, message),
    )


def _said(service: Service, caller: Caller, request: Request, role: str, name: str, message: str) -> Said:
    asked = CreateChat(
        model=name,
        # As browsers send forms, lines end otherwise than models know.
        messages=[ChatMessage(role="user", content=message.replace("\r\n", "\n"))],
        max_tokens=_LONGEST_ANSWER,
        temperature=0,
    )
    try:
        text = create_chat(service, caller, request, asked).choices[0].message.content
    except ApiError as error:
        return Said(role, name, error.message, is_answer=False)
    return Said(role, name, text, is_answer=True)
