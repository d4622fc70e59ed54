"""The pages of the documentation, and what of them a reader would type."""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "results" / "index.md",
    *sorted(EXAMPLES.rglob("*.md")),
)
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Typed:
    """One line of a shell block, as it is typed.

    Attributes:
        page: by its path in the repository.
        text: without prompt and comment, its continuations joined.
    """

    page: str
    text: str


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page in these languages, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [dedent(code) for _, language, code in found if language in languages]


def typed(page: Path) -> list[Typed]:
    """All lines of a page's shell blocks, in order."""
    name = str(page.relative_to(ROOT))
    return [Typed(name, text) for text in lines_of("\n".join(blocks(page, "bash", "console")))]


def lines_of(script: str) -> list[str]:
    """The lines of a shell script, without prompts and comments, continuations joined."""
    lines = script.replace("\\\n", " ").split("\n")
    stripped = (re.split(r"(?:^|\s)#", line.strip().removeprefix("$ "))[0].strip() for line in lines)
    return [text for text in stripped if text]
