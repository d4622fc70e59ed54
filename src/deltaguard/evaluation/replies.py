"""What a server replies: which replies are answers, and what of the others people and files may get."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from deltaguard.errors import DeltaguardError
from deltaguard.files import ANY_OBJECT, parse_json

AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may be others a moment later."""

_AT_LIMIT = ("length", "max_tokens")

_ENDINGS = (
    None,
    "stop",
    "eos",
    "eos_token",
    "stop_sequence",
    "end_turn",
    "content_filter",
    *_AT_LIMIT,
)
"""How an answer may end; one that a server gave up, or that calls a tool, is none."""

_BEGINNING = 80
"""Characters of a reply that cannot be read, for messages."""

_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


MOST_CHARACTERS = 300
"""Of what a server says of an error."""

_SHORTEST = 6
"""Shorter keys are placeholders for servers that need none, and words that any text may hold."""

_HEADER = re.compile(r"(authorization\W{0,8}[:=]\W{0,8})(?:(?:bearer|basic)\s+)?[^\s\"',;}]+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)(?!\*\*\*)[^\s\"',;}]+", re.IGNORECASE)


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None

    @property
    def has_thoughts(self) -> bool:
        """Whether the server set what the model thought beside what it said."""
        return bool(self.reasoning or self.reasoning_content)


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    error: Any = None


class _Completion(BaseModel):
    # One is asked for. Of a million wrong ones, each would be a problem to tell.
    choices: list[_Choice] = Field(default=[], max_length=10)
    error: Any = None


@dataclass(frozen=True)
class Failure:
    """A reply that holds no answer.

    Attributes:
        reason: what came instead, as the server says it.
        again: whether the same request may fare better a moment later.
        is_away: whether there was no reply, or one that says that the server cannot answer now.
    """

    reason: str
    again: bool = True
    is_away: bool = False


def read_reply(status: int, text: str, *, elsewhere: str | None = None) -> str | Failure:
    """Tell an answer from everything else that a server may send.

    An answer is what the message says, or the refusal that some services set beside an empty content. It is
    an answer where it is empty, where it ends at the limit of tokens (`length`), and where the service's
    filter cut it off or withheld it (`content_filter`): that is how the service answers. Thoughts that leave
    no token to an answer are a failure.

    Args:
        status: of HTTP.
        text: of the body. Lone halves of surrogate pairs in it, which no file can hold, become U+FFFD.
        elsewhere: where the server sends its visitors.

    Example:
        >>> read_reply(200, '{"choices": [{"message": {"content": " Yes. "}}]}')
        'Yes.'
        >>> read_reply(200, '{"error": "out of memory"}')
        Failure(reason='the reply is an error: out of memory', again=True, is_away=False)
    """
    if not 200 <= status < 300:
        return _refused(status, text, elsewhere)
    whole = _ESCAPE.sub(lambda found: r"\ufffd" if found[1] else found[0], text)
    try:
        reply = parse_json(whole.encode(), _Completion, source="the reply", remedy="")
    except DeltaguardError as error:
        return Failure(f"{str(error).strip()}; it begins with {text[:_BEGINNING]!r}")
    if reply.error is not None:
        return Failure(f"the reply is an error: {_said(reply.error)}")
    if not reply.choices:
        return Failure(f"the reply has no choices; it begins with {text[:_BEGINNING]!r}")
    return _answer(reply.choices[0])


def _answer(choice: _Choice) -> str | Failure:
    if choice.error is not None or choice.finish_reason == "error":
        return Failure(f"the reply is an error{': ' if choice.error else ''}{_said(choice.error or '')}")
    if choice.finish_reason not in _ENDINGS:
        return Failure(f"the answer ended by {choice.finish_reason!r}, not by itself")
    said = choice.message
    text = (said.content or "").strip() or (said.refusal or "").strip()
    if not text and choice.finish_reason in _AT_LIMIT and (said.content is None or said.has_thoughts):
        return Failure(
            "the limit of tokens was reached before an answer began, by thoughts: switch thinking off on the "
            "server, or have it leave answers their tokens",
            again=False,
        )
    if said.content is None and said.refusal is None and choice.finish_reason != "content_filter":
        return Failure("the message has neither content nor refusal")
    return text


def _refused(status: int, text: str, elsewhere: str | None) -> str | Failure:
    try:
        body = parse_json(text.encode(), ANY_OBJECT, source="", remedy="")
    except DeltaguardError:
        body = {}
    error = body.get("error")
    if status == 400 and isinstance(error, dict) and error.get("code") == "content_filter":
        return ""
    said = text if error is None else _said(error)
    if elsewhere and 300 <= status < 400:
        said = f"the server sends requests to {elsewhere}, where they are not taken: give that address"
    is_away = status in AGAIN or status >= 500
    reason = f"status {status}{': ' if said.strip() else ''}{said}"
    return Failure(reason, again=is_away, is_away=is_away)


def _said(error: Any) -> str:
    """Find the message of an error object; all of what is none."""
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else str(error)


def without_secrets(text: str, secrets: Sequence[str]) -> str:
    """Replace each secret of six characters or more by `***`, wherever it stands.

    Example:
        >>> without_secrets("The key sk-12345 is wrong.", ["sk-12345"])
        'The key *** is wrong.'
    """
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return text


def shown(text: str, secrets: Sequence[str]) -> str:
    r"""Put what a server says of an error into one line of 300 characters at most, without secrets.

    Values of `Authorization` and after `Bearer` are secrets, whatever they are.

    Example:
        >>> shown("401:  got\n Authorization: Bearer abc", [])
        '401: got Authorization: ***'
    """
    bare = _BEARER.sub(r"\1***", _HEADER.sub(r"\1***", without_secrets(text, secrets)))
    line = " ".join(bare.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}..."
