"""Configurations of models that no machine can build: transformers would try, without end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import ANY_OBJECT, read_json

MOST_PARTS = 1000
"""Layers, or experts of a layer; the largest models have half of it."""

_SHOWN_DIGITS = 40
# What configurations call the number of parts that are built one by one.
_COUNTED = ("layers", "n_layer", "blocks", "experts", "depth", "labels")


def refuse_giants(folder: Path, reference: str) -> None:
    """Refuse a model whose configuration asks for more layers than any model has.

    Args:
        folder: of the model.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: it does, or the configuration cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    found = list(_giants(read_json(path, ANY_OBJECT, remedy="Copy it again.")))
    if found:
        raise DeltaguardError(
            listed(f"The config.json of {reference} asks for more than {MOST_PARTS:,} parts of a kind", found)
            + "\nCopy it again from where the model comes from."
        )


def _giants(content: Any) -> Iterator[str]:
    """Each count that is too large, at any depth."""
    if isinstance(content, list):
        for value in content:
            yield from _giants(value)
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, int | float) and value > MOST_PARTS and name.endswith(_COUNTED):
                yield f"`{name}` is {str(value)[:_SHOWN_DIGITS]}"
            yield from _giants(value)
