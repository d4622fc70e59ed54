"""The version and the date of a release, in the three files that say them, and the repository's address.

`python -m tools.release prepare 0.2.0` writes them, and what stands under Unreleased becomes the section of
that version; for a version that has one already, only the date is renewed. `python -m tools.release notes`
prints that section, or exits with 1 where the files do not agree or the README is none for PyPI.
`python -m tools.release address https://github.com/OWNER/NAME` writes the address, once.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG, CITATION, PROJECT, README = "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "README.md"

_UNRELEASED = re.compile(r"^## Unreleased\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## (\d\S*) - (\S+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_RELATIVE = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|#)([^)\s]+)\)")
_NOTHING_YET = " Nothing has been released yet."
_FROM_CLONE = "from a clone"
_PLACES = {
    PROJECT: {"version": re.compile(r'(?m)^version = "(.*)"$')},
    CITATION: {
        "version": re.compile(r"(?m)^version: (.*)$"),
        "date": re.compile(r"(?m)^date-released: (.*)$"),
    },
}


def prepare(root: Path, version: str, date: str) -> None:
    """Write version and date into all three files.

    Args:
        root: the repository.
        version: without a `v`, such as "0.2.0".
        date: of the release, ISO 8601.

    Raises:
        ValueError: a file has no place for them, or there is nothing to release.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"{version} is no version such as 0.2.0")
    changes = (root / CHANGELOG).read_text(encoding="utf-8")
    newest = _SECTION.search(changes)
    if newest and newest[1] == version:
        changes = changes.replace(f"## {version} - {newest[2]}\n", f"## {version} - {date}\n")
    else:
        unreleased = _UNRELEASED.search(changes)
        if unreleased is None or not unreleased[1].strip():
            raise ValueError(f"{CHANGELOG} has nothing under Unreleased")
        changes = changes.replace("## Unreleased\n", f"## Unreleased\n\n## {version} - {date}\n", 1)
    written = {CHANGELOG: changes.replace(_NOTHING_YET, "")}
    for name, places in _PLACES.items():
        text = (root / name).read_text(encoding="utf-8")
        for what, place in places.items():
            found = _only(name, what, place, text)
            text = text[: found.start(1)] + {"version": version, "date": date}[what] + text[found.end(1) :]
        written[name] = text
    for name, text in written.items():
        (root / name).write_text(text, encoding="utf-8")


def address(root: Path, repository: str) -> None:
    """Write the repository's address into project, citation and README, whose links PyPI shows as well.

    Args:
        root: the repository.
        repository: such as `https://github.com/OWNER/NAME`.

    Raises:
        ValueError: that is no address, or one has been written before.
    """
    if not re.fullmatch(r"https://[^/\s]+(/[^/\s]+)+", repository):
        raise ValueError(f"{repository} is no address such as https://github.com/OWNER/NAME")
    project, citation = ((root / name).read_text(encoding="utf-8") for name in (PROJECT, CITATION))
    if "repository-code:" in citation:
        raise ValueError(f"{CITATION} has a repository already: change it by hand")
    urls = f'[project.urls]\nRepository = "{repository}"\nChangelog = "{repository}/blob/main/{CHANGELOG}"\n'
    readme = (root / README).read_text(encoding="utf-8")
    written = {
        PROJECT: project.replace("[project.urls]\n", urls, 1),
        CITATION: citation.replace("license:", f'repository-code: "{repository}"\nlicense:', 1),
        # A picture as it is, and not the page about it.
        README: _RELATIVE.sub(
            lambda link: f"{link[1]}{link[2]}({repository}/{'raw' if link[1] else 'blob'}/main/{link[3]})",
            readme,
        ),
    }
    for name, text in written.items():
        (root / name).write_text(text, encoding="utf-8")


def notes(root: Path) -> str:
    """Find what is new in the version that the files agree on.

    Raises:
        ValueError: they do not agree, changes stand under Unreleased, or the README, which PyPI shows for
            ever, has links that lead nowhere there, or installs from a clone.
    """
    changes = (root / CHANGELOG).read_text(encoding="utf-8")
    newest, unreleased = _SECTION.search(changes), _UNRELEASED.search(changes)
    if newest is None:
        raise ValueError(
            f"{CHANGELOG} has no section of a release: run `python -m tools.release prepare VERSION`"
        )
    expected = {"version": newest[1], "date": newest[2]}
    problems = [
        f"{name} has {what} {found}, {CHANGELOG} {expected[what]}"
        for name, places in _PLACES.items()
        for what, place in places.items()
        if (found := _only(name, what, place, (root / name).read_text(encoding="utf-8"))[1]) != expected[what]
    ]
    if unreleased and unreleased[1].strip():
        problems.append(f"{CHANGELOG} has changes under Unreleased that would be part of {newest[1]}")
    readme = (root / README).read_text(encoding="utf-8")
    if links := _RELATIVE.findall(readme):
        problems.append(
            f"{README} has {len(links)} links that lead nowhere on PyPI: run "
            "`python -m tools.release address REPOSITORY`"
        )
    if _FROM_CLONE in readme:
        problems.append(
            f"{README} installs {_FROM_CLONE}: PyPI shows it, so it says `pip install deltaguard`"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return newest[3].strip() + "\n"


def _only(name: str, what: str, place: re.Pattern[str], text: str) -> re.Match[str]:
    found = list(place.finditer(text))
    if len(found) != 1:
        raise ValueError(f"{name} has {len(found)} places for the {what} in place of one")
    return found[0]


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Find the command; its exit code is 1 where the files do not agree or cannot be prepared."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("prepare").add_argument("version")
    verbs.add_parser("notes")
    verbs.add_parser("address").add_argument("repository")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "prepare":
            prepare(root, given.version, datetime.now(UTC).date().isoformat())
        elif given.verb == "address":
            address(root, given.repository)
        else:
            print(notes(root), end="")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
