"""Texts of servers as people and files may get them: without keys, in one line, and short."""

import re
from collections.abc import Sequence

MOST_CHARACTERS = 300
"""Of what a server says of an error."""

_SHORTEST = 6
"""Shorter keys are placeholders for servers that need none, and words that any text may hold."""

_HEADER = re.compile(r"(authorization\W{0,8}[:=]\W{0,8})(?:(?:bearer|basic)\s+)?[^\s\"',;}]+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)(?!\*\*\*)[^\s\"',;}]+", re.IGNORECASE)


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
