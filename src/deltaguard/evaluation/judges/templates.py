"""The texts that judges are asked with: deltaguard's own, and those that come with a guard model."""

import re
from collections.abc import Mapping
from importlib.resources import files

from deltaguard.errors import DeltaguardError

_FIELD = re.compile(r"\{([a-z_]+)\}")
_QUOTED = re.compile(r"'''(.*?)'''|\"\"\"(.*?)\"\"\"", re.DOTALL)


def package_prompt(name: str) -> str:
    """Read a prompt of the package (`prompts/NAME.txt`)."""
    folder = files("deltaguard") / "evaluation" / "judges" / "prompts"
    return (folder / f"{name}.txt").read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values into the `{fields}` of a template; braces in values and other braces stay as they are.

    Example:
        >>> fill("Q: {prompt} A: {answer}", {"prompt": "{answer}?", "answer": "{}"})
        'Q: {answer}? A: {}'
    """
    return _FIELD.sub(lambda found: values.get(found[1], found[0]), template)


def fields(template: str) -> frozenset[str]:
    """List the names of a template's `{fields}`."""
    return frozenset(_FIELD.findall(template))


def template_in_card(card: str, wanted: frozenset[str], *, source: str) -> str:
    """Find the input format that a model card shows as a Python text in three quotes, by its fields.

    Args:
        card: the model card.
        wanted: the fields that the format has, and no others.
        source: where the card lies, for the error.

    Raises:
        DeltaguardError: the card shows no such format, or several different ones.

    Example:
        >>> template_in_card('x = \"\"\"Rate {prompt}\"\"\"', frozenset({"prompt"}), source="README.md")
        'Rate {prompt}'
    """
    shown = {one or other for one, other in _QUOTED.findall(card)}
    found = [text for text in shown if fields(text) == wanted]
    if len(found) != 1:
        raise DeltaguardError(
            f"The model card {source} shows {len(found)} texts with the fields "
            f"{', '.join(sorted(wanted))}, and one is needed: the guard's input format. Give the format as "
            "prompt_file."
        )
    return found[0]
