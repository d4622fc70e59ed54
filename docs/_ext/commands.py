"""The command reference, generated from the program while its page is read, so that it cannot go stale."""

from sphinx.application import Sphinx

MARK = "<!-- commands -->"


def reference() -> str:
    """All verbs with their arguments, in Markdown, a heading of the second level for each."""
    from deltaguard.cli.app import build_app

    generated = build_app().generate_docs("markdown", heading_level=1)
    # Before the list of verbs stand a title and a table of contents, which the page has of its own.
    _, _, verbs = generated.partition("**Commands**:")
    return verbs.replace(" *[default: False]*", "")


def _fill(_app: Sphinx, _page: str, content: list[str]) -> None:
    if MARK in content[0]:
        content[0] = content[0].replace(MARK, reference())


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill the mark in pages."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
