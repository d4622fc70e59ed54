"""The templates and what they may call."""

from typing import Any

import jinja2
from markupsafe import Markup

from deltaguard.reports.text import (
    capital,
    duration,
    interval,
    model_label,
    moment,
    number,
    option,
    percent,
    points,
    points_interval,
    share_interval,
    short_reference,
    size,
    sort_value,
)
from deltaguard.text import printable_lines

_FORMATS = (
    capital,
    duration,
    interval,
    model_label,
    moment,
    number,
    option,
    percent,
    points,
    points_interval,
    share_interval,
    short_reference,
    size,
    sort_value,
)


def _written(value: Any) -> Any:
    """A value as it is put into a page: no name or answer holds what a browser or terminal would obey."""
    if isinstance(value, Markup):
        return Markup(printable_lines(value))  # noqa: S704  # it was markup before
    return printable_lines(value) if isinstance(value, str) else value


def environment() -> jinja2.Environment:
    """Templates of this package; every value is escaped in pages, none in Markdown.

    A value that a template names and nobody gave is an error.

    Returns:
        An environment with the formats of `draw.text` as filters.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("deltaguard.reports"),
        autoescape=jinja2.select_autoescape(disabled_extensions=("md.jinja",), default=True),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_written,
    )
    for function in _FORMATS:
        templates.filters[function.__name__] = function
    return templates
