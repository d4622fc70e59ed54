"""Reports as others may see them: names of files without the folders above them, the user's own affair."""

import re
from collections.abc import Mapping
from typing import Any

from deltaguard.reports.text import short_reference

# A slash after a letter or a colon belongs to a Hub id or an address.
_PATH = re.compile(r"(?<![\w/:.~-])(?:~|\.{1,2})?/(?:[^\s/:;,'\"()]+/)*([^\s/:;,'\"()]+)/?")
_PLACES = ("path", "file", "prompt_file", "cache", "model")


def without_folders(text: str) -> str:
    """A sentence with each absolute path cut to its last name.

    A path with a space in it is cut up to there alone.

    Example:
        >>> without_folders("There is no file /home/me/set.csv (see https://example.org/set).")
        'There is no file set.csv (see https://example.org/set).'
    """
    return _PATH.sub(r"\1", text)


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A suite's settings with files, folders and models by their names alone.

    Example:
        >>> shown_settings({"sections": [{"name": "mine", "file": "/home/me/set.csv"}]})
        {'sections': [{'name': 'mine', 'file': 'set.csv'}]}
    """
    return {name: _shown(name, value) for name, value in settings.items()}


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {inner: _shown(str(inner), each) for inner, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(name, each) for each in value]
    return short_reference(value) if name in _PLACES and isinstance(value, str) else value
