"""What nothing refers to any more, found and removed while a service may be running."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from deltaguard.errors import DeltaguardError
from deltaguard.models.durable import InUseError, flush_folder, lock_folder
from deltaguard.service.contents import Content
from deltaguard.service.context import Service
from deltaguard.service.tables import UNFINISHED, File, Job, Key, Model

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

    Raises:
        DeltaguardError: the database has no key, or `files_url` is not this service's. They are others than
            those of the service which works in this folder, and everything would be garbage.
    """
    service.contents.require_owner(service.id)
    # Before the database is read: what is made meanwhile is not among them.
    jobs_there, models_there = _made_by_jobs(service.data / "jobs"), _made_by_jobs(service.data / "models")
    contents = list(service.contents.all())
    with service.sessions.reading() as session:
        if session.scalar(select(Key.number).limit(1)) is None:
            raise DeltaguardError(
                f"The database of {service.data} has no key, so no service has worked with it: "
                "nothing is removed. Name the service's folder, and in its service.yaml its database."
            )
        files = set(session.scalars(select(File.id)))
        models = set(session.scalars(select(Model.job_id)))
        jobs = {job.id: job for job in session.scalars(select(Job))}
    needed = {name for name, job in jobs.items() if job.status in UNFINISHED or job.review == "waiting"}
    before = time.time() - days * _DAY_S
    recent = {name for name, job in jobs.items() if (job.finished_at or 0) > before}
    return [
        *_folders(_inside(service.data / REMOVING), set(), "was being removed"),
        *_folders(jobs_there, needed | recent, "of a job that has ended"),
        *_folders(models_there, needed | models, "of a model that was deleted"),
        *_contents(contents, files),
    ]


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _made_by_jobs(folder: Path) -> list[Path]:
    """List what jobs put into a folder; what else somebody keeps there is no concern of ours."""
    return [path for path in _inside(folder) if path.name.startswith("ftjob-")]


def _folders(found: Sequence[Path], kept: set[str], why: str) -> Iterator[Leftover]:
    for path in found:
        if path.name not in kept:
            yield Leftover(f"{path.parent.name}/{path.name}", why, _size(path))


def _size(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.lstat().st_size
        except FileNotFoundError:
            continue  # Removed meanwhile.
    return found


def _contents(found: Sequence[Content], kept: set[str]) -> Iterator[Leftover]:
    before = time.time() - _GRACE_S
    for content in found:
        ours = content.name.startswith("file-")
        if ours and content.name not in kept and content.changed_at < before:
            why = "of an upload that did not end" if "." in content.name else "of a file that was deleted"
            yield Leftover(f"files/{content.name}", why, content.bytes)


def remove_leftover(service: Service, leftover: Leftover) -> bool:
    """Remove one of `find_leftovers`.

    Returns:
        Whether it was removed: a folder in which a process still works is not, nor what another user owns.
    """
    kind, _, name = leftover.place.partition("/")
    if kind == "files":
        service.contents.remove(name)
        return True
    path = service.data / kind / name
    if kind != REMOVING:
        try:
            lock = lock_folder(path)
        except (InUseError, FileNotFoundError, PermissionError):
            return False
        try:
            path = _set_aside(service, path)
        except PermissionError:
            return False
        finally:
            os.close(lock)
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _set_aside(service: Service, path: Path) -> Path:
    """Move a folder out of its place, at once and for good."""
    target = service.data / REMOVING / f"{path.parent.name}-{path.name}"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    flush_folder(path.parent)
    return target
