"""Names of files in an output folder, which may come from a report or journal that someone else wrote."""

import os
from pathlib import Path, PurePosixPath

from deltaguard.errors import DeltaguardError
from deltaguard.models.layout import STAGING_FOLDER

_LONGEST = 1024
_LONGEST_PART = 200
_SHOWN = 80

_SHARED_BLOBS = ".huggingface-shared-blobs"
"""The file by which huggingface_hub, from 2.4 on, knows the blobs that repositories share."""


def name_problem(name: str) -> str | None:
    """Say why a text is no name for a file in an output folder, None where it is one.

    Example:
        >>> name_problem("../thesis.txt")
        "'../thesis.txt' is no name for a file in the output folder"
    """
    path = PurePosixPath(name)
    if len(name) > _LONGEST or any(len(part) > _LONGEST_PART for part in path.parts):
        return f"{name[:_SHOWN]!r}... is too long for the name of a file"
    # Neither reports nor journals can hold the surrogates that stand for bytes other than UTF-8.
    plain = str(path) == name and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name)
    within = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    if plain and within and path.parts[0] != STAGING_FOLDER:
        return None
    return f"{name!r} is no name for a file in the output folder"


def place_problem(folder: Path, name: str) -> str | None:
    """Say why a file of that name would not lie in a folder, None where it would.

    Args:
        folder: the folder.
        name: of the file, as `name_problem` describes; a subfolder on the way may be a link.
    """
    problem = name_problem(name)
    if problem:
        return problem
    parent = Path(os.path.realpath((folder / name).parent))
    if not parent.is_relative_to(os.path.realpath(folder)):
        return f"{name} leads out of {folder}, to {parent}"
    return None


def inside(folder: Path, name: str) -> Path:
    """Find the place of a file in an output folder.

    Raises:
        DeltaguardError: the name would lead out of the folder.
    """
    problem = place_problem(folder, name)
    if problem:
        raise DeltaguardError(f"{problem}.")
    return folder / name


def link_target(folder: Path, path: Path) -> Path | None:
    """Find where a link in a model's folder leads to, None where that is in the folder.

    The files of a snapshot in a Hub cache are links to the repository's `blobs`, and these may be links to
    those that all repositories of the cache share: both count as the folder.

    Args:
        folder: the model's folder.
        path: a file in it.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target.is_relative_to(root):
        return None
    snapshot = next(filter(_is_snapshot, (root, *root.parents)), None)
    if snapshot is None:
        return target
    repository = snapshot.parent.parent
    own, shared = repository / "blobs", repository.parent / "blobs"
    if target.is_relative_to(own):
        return None
    is_shared = (shared / _SHARED_BLOBS).is_file() and target.is_relative_to(shared)
    first = os.path.realpath((path.parent / path.readlink()).parent) if path.is_symlink() else ""
    return None if is_shared and first == str(own) else target


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is a snapshot of a repository in a Hub cache."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
