"""Whether a checkpoint may be written into a folder, and which files there it may replace."""

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import read_json
from deltaguard.models.durable import explained, lock_folder
from deltaguard.models.journal import JOURNAL_NAME, Journal
from deltaguard.models.layout import STAGING_FOLDER
from deltaguard.models.names import place_problem
from deltaguard.reports.records.restore import REPORT_NAME

_SHOWN = 3
_UNREAD = "Choose another output folder, or empty this one."


@dataclass(frozen=True)
class WriteRequest:
    """What a run wants to write into a folder.

    Attributes:
        names: of all files, where they are known before the work.
        plan_hash: identifies what is written; None where it is not known yet.
        resume: whether it goes on with what an interrupted run finished.
        overwrite: whether it may replace a checkpoint.
    """

    names: Collection[str]
    plan_hash: str | None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Admission:
    """On which terms a run may write into a folder.

    Attributes:
        journal: of the interrupted run that it goes on with, None where it starts.
        replaces: files of an earlier run that it may replace or remove, None where it may replace nothing.
    """

    journal: Journal | None
    replaces: frozenset[str] | None

    @property
    def own(self) -> frozenset[str]:
        """Files in the folder that an earlier run wrote, or that the interrupted one has moved there."""
        return (self.replaces or frozenset()) | (self.journal.moved if self.journal else frozenset())


class _File(BaseModel):
    name: str


class _Listing(BaseModel):
    """What overwriting needs to know of a report, whichever release wrote it."""

    files: tuple[_File, ...]


def admit(out: Path, request: WriteRequest) -> Admission:
    """Decide whether a run may write into a folder; nothing is changed.

    Args:
        out: the output folder, which nobody else may be working in; it may be absent.
        request: what the run wants.

    Raises:
        DeltaguardError: the folder holds something that the run must not touch, or the progress of another
            plan. All files that are in the way are named.
    """
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    others = [name for name in found if name != STAGING_FOLDER]
    staging = out / STAGING_FOLDER
    links = [path for path in (staging, staging / "files", staging / JOURNAL_NAME) if path.is_symlink()]
    if links:
        raise DeltaguardError(f"{links[0]} is a link: remove it, or choose another output folder.")
    journal = Journal.load(staging / JOURNAL_NAME) if request.resume else None
    if journal is not None:
        if request.plan_hash not in (None, journal.plan_hash):
            raise DeltaguardError(
                f"{staging} holds the progress of another plan ({journal.plan_hash}; this one is "
                f"{request.plan_hash}): the models, the options or the release of deltaguard differ. "
                "Resume with the same ones, or start again with --overwrite and without --resume."
            )
        if others and journal.replaces is None and not journal.committing and not request.overwrite:
            raise DeltaguardError(_occupied(out, others, " beside the progress of this run"))
        journal.take_over()
        replaces = journal.replaces
    elif request.overwrite:
        replaces = _replaceable(out, others)
    else:
        if (staging / JOURNAL_NAME).exists() and not request.resume:
            raise DeltaguardError(
                f"{out} holds the progress of an unfinished run: "
                "go on with --resume, or start again with --overwrite."
            )
        if others:
            nothing = " and there is nothing to resume" if request.resume else ""
            raise DeltaguardError(_occupied(out, others, nothing))
        replaces = None
    admission = Admission(journal, replaces)
    misplaced = [problem for name in sorted(admission.own) if (problem := place_problem(out, name))]
    if misplaced:
        raise DeltaguardError(
            f"{listed(f'{out} says that an earlier run wrote what cannot be replaced', misplaced)}\n{_UNREAD}"
        )
    refuse_foreign(out, request.names, admission.own)
    return admission


def check_output(
    out: str | Path, request: WriteRequest, *, protected: Iterable[Path], needed: int, what: str = ""
) -> int:
    """Refuse what a `CheckpointWriter` with the same arguments would refuse, and make nothing.

    Args:
        out: the output folder.
        request: what would be written.
        protected: folders of inputs.
        needed: bytes that would be written.
        what: as in `require_space`.

    Returns:
        The bytes that are still to be written: those of finished files of an interrupted run are not.

    Raises:
        DeltaguardError: as the writer.
    """
    folder = Path(out).absolute()
    refuse_inputs(folder, protected)
    with explained(folder):
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "", existing)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "", existing)
        lock = lock_folder(existing) if existing == folder else None
        try:
            admission = admit(folder, request)
        finally:
            if lock is not None:
                os.close(lock)
    records = admission.journal.records.values() if admission.journal else ()
    left = needed - sum(record.bytes for record in records)
    require_space(folder, left, what=what)
    return left


def refuse_inputs(out: Path, protected: Iterable[Path]) -> None:
    """Refuse an output folder that is, contains or lies in a folder of an input.

    Raises:
        DeltaguardError: it does.
    """
    real = Path(os.path.realpath(out))
    for folder in protected:
        other = Path(os.path.realpath(folder))
        if real == other or real in other.parents or other in real.parents:
            relation = "is" if real == other else "contains" if real in other.parents else "lies in"
            raise DeltaguardError(
                f"The output folder {out} {relation} the input {folder}, which would be damaged: "
                "choose another output folder."
            )


def refuse_foreign(out: Path, names: Iterable[str], own: Collection[str]) -> None:
    """Refuse to write files in whose place something lies that no earlier run of deltaguard wrote.

    Args:
        out: the output folder.
        names: of the files to be written.
        own: those that may be replaced.

    Raises:
        DeltaguardError: all that is in the way is named.
    """
    problems = [problem for name in sorted(names) if (problem := _obstacle(out, name, own))]
    if problems:
        raise DeltaguardError(
            f"{listed(f'{out} holds what this run must not replace', problems)}\n"
            f"Only what {REPORT_NAME} lists there is replaced. Move the rest away, or choose another output "
            "folder."
        )


def require_space(out: Path, needed: int, *, what: str = "") -> None:
    """Refuse to start where the disk is too small.

    Args:
        out: the output folder; it may be absent.
        needed: bytes still to be written.
        what: words for the message that say what kind of number that is.

    Raises:
        DeltaguardError: with the bytes needed and free.
    """
    with explained(out):
        free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.is_dir())).free
    if needed > free:
        raise DeltaguardError(
            f"{out} needs {needed:,} bytes{what}, and {free:,} are free there: "
            "free some space or choose another output folder."
        )


def unlisted(out: Path, files: Iterable[str]) -> list[str]:
    """Name what lies in an output folder beside the files of its run.

    Args:
        out: the folder.
        files: names of the run's files; its report is understood, and so is the progress of another run.

    Returns:
        Files, and folders (with a slash at the end) that hold none of the run's files.
    """
    known = {REPORT_NAME, STAGING_FOLDER, *files}
    folders = {str(parent) for name in known for parent in PurePosixPath(name).parents}
    return [*_unlisted(out, "", known, folders)]


def _unlisted(out: Path, below: str, known: Collection[str], folders: Collection[str]) -> Iterable[str]:
    for path in sorted((out / below).iterdir()):
        name = below + path.name
        if name in known:
            continue
        if not path.is_dir() or path.is_symlink():
            yield name
        elif name in folders:
            yield from _unlisted(out, f"{name}/", known, folders)
        else:
            yield f"{name}/"


def _not_empty(out: Path, others: Sequence[str]) -> str:
    return f"{out} is not empty ({', '.join(others[:_SHOWN])}{', ...' if len(others) > _SHOWN else ''})"


def _occupied(out: Path, others: Sequence[str], nothing: str) -> str:
    return (
        f"{_not_empty(out, others)}{nothing}. Choose another output folder, "
        "or replace the checkpoint in it with --overwrite."
    )


def _replaceable(out: Path, others: Sequence[str]) -> frozenset[str]:
    """Find the files of earlier runs: what the report lists, and what the journal of one given up knows."""
    staging, report = out / STAGING_FOLDER, out / REPORT_NAME
    try:
        journal = Journal.load(staging / JOURNAL_NAME)
    except DeltaguardError:
        # Starting anew is what such an error recommends; the report alone tells the files then.
        journal = None
    known: frozenset[str] = frozenset()
    if journal is not None:
        moved = (name for name in journal.moved if not (staging / "files" / name).exists())
        known = (journal.replaces or known).union(moved)
    if not os.path.lexists(report):
        if others and not known:
            raise DeltaguardError(
                f"{_not_empty(out, others)} and holds no {REPORT_NAME}, so nothing tells which of its files "
                f"an earlier run wrote. {_UNREAD}"
            )
        return known
    if report.is_symlink():
        raise DeltaguardError(f"{report} is a link, and not a report that was written there. {_UNREAD}")
    names = (file.name for file in read_json(report, _Listing, remedy=_UNREAD).files)
    return known.union([REPORT_NAME], names)


def _obstacle(out: Path, name: str, own: Collection[str]) -> str | None:
    """Why a file cannot be put into its place, None where it can."""
    problem = place_problem(out, name)
    if problem:
        return problem
    path = out / name
    if os.path.lexists(path) and (name not in own or (path.is_dir() and not path.is_symlink())):
        return name
    for parent in PurePosixPath(name).parents[:-1]:
        if os.path.lexists(out / parent) and not (out / parent).is_dir() and str(parent) not in own:
            return f"{parent}, a file, where {name} needs a folder"
    return None
