"""What all HTML pages share: one file each, fetching nothing, whose only script sorts its tables."""

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from deltaguard.reports.palette import palette_css
from deltaguard.reports.templating import environment


@dataclass(frozen=True)
class Chart:
    """A chart and its words.

    Attributes:
        title: what is drawn.
        note: of what it is the share.
        svg: the drawing.
        spoken: the drawing in words, for those who do not see it.
    """

    title: str
    note: str
    svg: str
    spoken: str


def render(template: str, **values: Any) -> str:
    """A page from its template.

    The content security policy of a page names the hash of its one script, so that nothing else runs,
    whatever a model's answer holds.

    Args:
        template: file name in `templates/`; it extends `base.html.jinja`.
        values: what the template shows.

    Returns:
        A complete HTML document.
    """
    script = sort_script()
    shared = {"script": script, "script_hash": script_hash(script), "palette": palette_css(":root")}
    return environment().get_template(template).render({**values, **shared})


def sort_script() -> str:
    """The script that sorts tables, as it stands between its tags."""
    return (files("deltaguard.reports") / "templates" / "sort.js").read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """The source expression by which a content security policy allows an inline script.

    Args:
        script: the text between the tags, exactly.

    Example:
        >>> script_hash("")
        'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
