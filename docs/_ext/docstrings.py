"""Lets autodoc read docstrings whose code is Markdown, and finds public names that no page describes."""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

PAGE = "api"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
# Pydantic's constraints; the descriptions say what they mean.
_CONSTRAINED = re.compile(r"Annotated\[(\w+)(?:, \w+\(\w+=[^)]*\))+\]")
_logger = logging.getLogger(__name__)


def _to_rst(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Turn fenced code into code blocks; napoleon, which reads the sections, comes later."""
    lines[:] = _FENCE.sub(_code_block, "\n".join(lines)).split("\n")


def _code_block(fence: re.Match[str]) -> str:
    indent, code = fence["indent"], fence["code"].rstrip("\n")
    shifted = "\n".join(f"   {line}" if line.strip() else "" for line in code.split("\n"))
    return f"{indent}.. code-block:: {fence['language'] or 'text'}\n\n{shifted}\n"


def _plain_types(*arguments: Any) -> tuple[str | None, str | None]:
    *_, signature, returned = arguments
    return signature and _CONSTRAINED.sub(r"\1", signature), returned


def _check(_app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that the page does not describe."""
    import deltaguard
    from deltaguard import solvers

    described = {entry[0] for entry in env.get_domain("py").get_objects()}
    public = [f"{module.__name__}.{name}" for module in (deltaguard, solvers) for name in module.__all__]
    for name in public:
        if name not in described:
            _logger.warning("%s is public and not described", name, location=PAGE)


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to autodoc before napoleon does."""
    app.connect("autodoc-process-docstring", _to_rst, priority=400)
    app.connect("autodoc-process-signature", _plain_types)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
