"""The templates and what they may call."""

import jinja2

from deltaguard.draw.text import (
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


def environment() -> jinja2.Environment:
    """Templates of this package; every value is escaped in pages, none in Markdown.

    A value that a template names and nobody gave is an error.

    Returns:
        An environment with the formats of `draw.text` as filters.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("deltaguard.draw"),
        autoescape=jinja2.select_autoescape(disabled_extensions=("md.jinja",), default=True),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in _FORMATS:
        templates.filters[function.__name__] = function
    return templates
