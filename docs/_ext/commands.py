"""The command reference, generated from the program while the page is read, so that it cannot go stale."""

import re

from sphinx.application import Sphinx

MARK = "<!-- commands -->"


def _fill(_app: Sphinx, _page: str, content: list[str]) -> None:
    if MARK in content[0]:
        content[0] = content[0].replace(MARK, reference())


def reference() -> str:
    """The reference of all verbs in Markdown, its headings from the second level on."""
    from deltaguard.cli.app import build_app

    generated = build_app().generate_docs("markdown", heading_level=1)
    # The page has a title, and a list of the verbs with what they do: once is enough.
    return generated[generated.index("**Commands**") :].replace("**Commands**:\n", "", 1)


def _in_second_person(text: str) -> str:
    return re.sub(r" \*\[default: False\]\*", "", text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill the mark in pages."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
