"""What nothing refers to any more, found and removed while a service may be running."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from deltaguard.models.durable import InUseError, flush_folder, lock_folder
from deltaguard.service.context import Service
from deltaguard.service.tables import UNFINISHED, File, Job, Model

REMOVING = "removing"
"""The folder in which what is being removed lies: nothing half removed stands where something whole did."""

_GRACE_S = 3600
"""A content is younger than this where its upload has not been noted yet."""

_DAY_S = 86_400


@dataclass(frozen=True)
class Leftover:
    """Something that can be removed.

    Attributes:
        place: in the data folder; of a content `files/` and its name, wherever it is kept.
        why: nothing needs it.
        bytes: its size.
    """

    place: str
    why: str
    bytes: int


def find_leftovers(service: Service, *, days: int) -> list[Leftover]:
    """List what can be removed.

    What belongs to a job that is not finished, or whose model waits for an operator, is none of it; nor is
    anything that a database row refers to.

    Args:
        service: the service, which may be running.
        days: for so long the folder of a job that has ended is kept, with its logs.
    """
    with service.sessions.begin() as session:
        files = set(session.scalars(select(File.id)))
        models = set(session.scalars(select(Model.job_id)))
        jobs = {job.id: job for job in session.scalars(select(Job))}
    needed = {name for name, job in jobs.items() if job.status in UNFINISHED or job.review == "waiting"}
    before = time.time() - days * _DAY_S
    recent = {name for name, job in jobs.items() if (job.finished_at or 0) > before}
    return [
        *_folders(service.data / REMOVING, set(), "was being removed"),
        *_folders(service.data / "jobs", needed | recent, "of a job that has ended"),
        *_folders(service.data / "models", needed | models, "of a model that was deleted"),
        *_contents(service, files),
    ]


def _folders(folder: Path, kept: set[str], why: str) -> Iterator[Leftover]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name not in kept:
            yield Leftover(f"{folder.name}/{path.name}", why, _size(path))


def _size(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.lstat().st_size
        except FileNotFoundError:
            continue  # Removed meanwhile.
    return found


def _contents(service: Service, kept: set[str]) -> Iterator[Leftover]:
    before = time.time() - _GRACE_S
    for content in service.contents.all():
        if content.name not in kept and content.changed_at < before:
            why = "of an upload that did not end" if "." in content.name else "of a file that was deleted"
            yield Leftover(f"files/{content.name}", why, content.bytes)


def remove_leftover(service: Service, leftover: Leftover) -> bool:
    """Remove one of `find_leftovers`.

    Returns:
        Whether it was removed: a folder in which a process still works is not.
    """
    kind, _, name = leftover.place.partition("/")
    if kind == "files":
        service.contents.remove(name)
        return True
    path = service.data / kind / name
    if kind != REMOVING:
        try:
            lock = lock_folder(path)
        except (InUseError, FileNotFoundError):
            return False
        try:
            path = _set_aside(service, path)
        finally:
            os.close(lock)
    shutil.rmtree(path, ignore_errors=True)
    return True


def _set_aside(service: Service, path: Path) -> Path:
    """Move a folder out of its place, at once and for good."""
    target = service.data / REMOVING / f"{path.parent.name}-{path.name}"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    flush_folder(path.parent)
    return target
