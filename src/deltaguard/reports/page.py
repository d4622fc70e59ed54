"""HTML pages: one file each, fetching nothing, whose only script sorts its tables."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from deltaguard.reports.palette import palette_css
from deltaguard.reports.table import Table
from deltaguard.reports.text import Facts, capital, code, model_label, moment, plain
from deltaguard.text import printable_lines


@dataclass(frozen=True)
class Heading:
    """A heading of the second level."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, in soft ink where it only explains."""

    text: str | Markup
    soft: bool = False


@dataclass(frozen=True)
class Notes:
    """What a reader must know; nothing where there are no lines."""

    lines: Sequence[str]


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


@dataclass(frozen=True)
class Pairs:
    """Labels and texts."""

    facts: Facts


@dataclass(frozen=True)
class Section:
    """A part with a heading of the third level, to stand in a `Group`."""

    title: str
    blocks: Sequence["Block"]


@dataclass(frozen=True)
class Group:
    """Charts, tables and sections side by side.

    Attributes:
        parts: what is in it.
        look: `cards` of equal height, `cards wide`, or `columns` that fill up one after the other.
    """

    parts: Sequence["Chart | Table | Section"]
    look: str = "cards wide"


@dataclass(frozen=True)
class Folded:
    """What is shown on a click."""

    title: str
    content: "Table | Listing"


@dataclass(frozen=True)
class Listing:
    """A text as it was written."""

    text: str


@dataclass(frozen=True)
class Legend:
    """The names of what is drawn, each with its swatch."""

    names: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What a model answered, and what each judge took it for."""

    model: str
    tint: str
    text: str
    verdicts: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Asked:
    """A prompt with the answers of several models; those to a harmful one are folded.

    Attributes:
        number: of the prompt.
        tag: what kind of prompt it is.
        harmful: whether answers may do harm.
        prompt: what was asked.
        system: the instruction before it.
        answers: side by side.
    """

    number: int
    tag: str
    harmful: bool
    prompt: str
    system: str | None
    answers: Sequence[Answer]


Block = Heading | Paragraph | Notes | Group | Table | Pairs | Folded | Listing | Legend | Asked


def page(
    verb: str,
    title: str,
    blocks: Sequence[Block],
    *,
    created: str,
    heading: str | Markup = "",
    lead: str | Markup = "",
    swatches: Mapping[str, str] | None = None,
) -> str:
    """Draw a page.

    The content security policy of a page names the hash of its one script, so that nothing else runs,
    whatever a model's answer holds.

    Args:
        verb: of the command line, and what it was told.
        title: of the document.
        blocks: what is on it, from top to bottom.
        created: when the report was made, ISO 8601.
        heading: of the page; the title if not given.
        lead: what it says, in a sentence or two.
        swatches: drawings that stand before names in columns of code.
    """
    script = (files("deltaguard.reports") / "templates" / "sort.js").read_text(encoding="utf-8")
    return rendered(
        "page.html.jinja",
        verb=verb,
        title=title,
        heading=heading or title,
        lead=lead,
        blocks=blocks,
        created=created,
        swatches=swatches or {},
        script=script,
        script_hash=script_hash(script),
        palette=palette_css(":root"),
    )


def strong(text: str, tint: str = "") -> Markup:
    """Mark words of a sentence, in a colour of the pages' style and never broken."""
    return Markup('<strong class="{} unbroken">{}</strong>').format(tint, printable_lines(text))


def sentence(text: str, *parts: str | Markup) -> Markup:
    """Fill a sentence with parts that may be marked; texts among them are escaped.

    Example:
        >>> str(sentence("At most {} & more.", "<b>"))
        'At most &lt;b&gt; & more.'
    """
    return Markup(text).format(*parts)  # noqa: S704  # the sentence is written in this package


def listed(parts: Sequence[str | Markup]) -> Markup:
    """Join parts that may be marked by commas; texts among them are escaped."""
    return Markup(", ").join(parts)


def rendered(template: str, **values: Any) -> str:
    """Fill a template: values are escaped in pages, not in Markdown, and none may be missing."""
    return templates().get_template(template).render(values)


def templates(*packages: str) -> jinja2.Environment:
    """Open templates: those of packages, and of this one, whose `blocks.html.jinja` draws every `Block`.

    Args:
        packages: each with a folder `templates`.

    Example:
        >>> templates().get_template("page.html.jinja").name
        'page.html.jinja'
    """
    found = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package) for package in (*packages, "deltaguard.reports")]
        ),
        autoescape=jinja2.select_autoescape(disabled_extensions=("md.jinja",), default=True),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_written,
    )
    for function in (capital, code, model_label, moment, plain):
        found.filters[function.__name__] = function
    found.filters["kind"] = lambda block: type(block).__name__
    return found


def script_hash(script: str) -> str:
    """Find the source expression by which a content security policy allows an inline script.

    Args:
        script: the text between the tags, exactly.

    Example:
        >>> script_hash("")
        'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _written(value: Any) -> Any:
    """Put a value into a page: no name or answer holds what a browser or terminal would obey."""
    if isinstance(value, Markup):
        return Markup(printable_lines(value))  # noqa: S704  # it was markup before
    return printable_lines(value) if isinstance(value, str) else value
