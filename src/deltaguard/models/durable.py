"""Files that are complete and on disk, or absent; and what to say where the operating system refuses."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError

_WORTH_A_THREAD = 1 << 20


class InUseError(DeltaguardError):
    """Another process is working in a folder."""


class HashedFile:
    """A file under a temporary name, written and hashed by a thread of its own.

    Attributes:
        bytes: written so far.
        digest: sha256 of them.
        notes: what the writer's caller wants to be recorded with the file.
    """

    def __init__(self, path: Path, shown: Path, size: int) -> None:
        """Create the file under its temporary name.

        Args:
            path: the temporary name.
            shown: where the user will find it, for messages.
            size: bytes that it will have, for messages.
        """
        self.bytes = 0
        self.digest = hashlib.sha256()
        self.notes: Any = None
        self._path = path
        self._shown = shown
        self._size = size
        self._file = path.open("wb", buffering=0)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flusher")
        self._pending = self._flushed = _done()

    def write(self, data: memoryview) -> None:
        """Append bytes, which must stay as they are until the next call of `write` or `finish`.

        Many bytes are written and hashed by a thread while the caller computes what comes next, and flushed
        by another one, so that little is left to flush at the end. What goes wrong there is raised by a later
        call.
        """
        self._wait()
        self._pending = self._worker.submit(self._append, data)
        if len(data) < _WORTH_A_THREAD:
            self._wait()

    def _append(self, data: memoryview) -> None:
        done = 0
        # One call of the operating system writes at most 2 GiB.
        while done < len(data):
            done += self._file.write(data[done:])
        self.bytes += len(data)
        if len(data) >= _WORTH_A_THREAD and self._flushed.done():
            self._flushed.result()
            self._flushed = self._flusher.submit(os.fsync, self._file.fileno())
        self.digest.update(data)

    def _wait(self) -> None:
        with explained(self._shown, self._size):
            self._pending.result()

    def finish(self, final: Path) -> None:
        """Flush the file to disk and give it its final name, durably."""
        self._wait()
        self._flushed.result()
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(final)
        flush_folder(final.parent)

    def close(self) -> None:
        """Release the file; it is removed where it was not finished."""
        self._worker.shutdown()
        self._flusher.shutdown()
        self._file.close()
        self._path.unlink(missing_ok=True)


def _done() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_files(folder: Path) -> None:
    """Make all files of a folder durable, those of folders in it and their names too."""
    for place, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(place) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        flush_folder(Path(place))


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that it is either there in full or not at all, whatever happens.

    Args:
        path: the file. Where it is a link, the file takes the link's place.
        text: all of it.

    Raises:
        DeltaguardError: the file cannot be written; what was there before is still there.
    """
    data = text.encode()
    partial = partial_file(path)
    with explained(path, len(data)):
        # A run that was killed may have left one; a link by that name must not be written through.
        partial.unlink(missing_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def partial_file(path: Path) -> Path:
    """Name the file under which `write_atomically` begins another one; a kill may leave it."""
    return path.with_name(f".{path.name}.partial")


def lock_folder(folder: Path, *, shared: bool = False, shown: Path | None = None) -> int:
    """Keep other processes from working in a folder.

    Args:
        folder: the folder.
        shared: whether others may hold such a lock too; one that is not shared excludes them all.
        shown: what the message calls the folder; by default what it is.

    Returns:
        A descriptor; the lock ends when it is closed, and so with the process.

    Raises:
        InUseError: another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InUseError(
            f"Another process is working in {shown or folder}. Wait for it, or choose another output folder."
        ) from error
    return descriptor


@contextlib.contextmanager
def explained(path: Path, needed: int | None = None) -> Generator[None, None, None]:
    """Turn what the operating system refuses into a message that says what to do.

    Args:
        path: what is read or written in the block.
        needed: bytes of it, where a full disk is among the possible failures.

    Raises:
        DeltaguardError: in the place of any OSError.
    """
    try:
        yield
    except OSError as error:
        around = (path, *path.parents)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = shutil.disk_usage(next(parent for parent in around if parent.is_dir())).free
            wanted = f"{needed:,} bytes are needed for it and " if needed is not None else ""
            message = (
                f"There is no space left for {path}: {wanted}{free:,} are free. "
                "Free some space and run the same command again (restore and calibrate: with --resume)."
            )
        elif error.errno in {errno.EACCES, errno.EPERM}:
            remedy = "Choose another folder or change its permissions."
            message = f"{path} cannot be accessed: permission denied. {remedy}"
        elif error.errno == errno.EROFS:
            message = f"{path} lies on a read-only file system: choose another output folder."
        elif error.errno in {errno.ENOTDIR, errno.EEXIST}:
            file = next((parent for parent in around if parent.is_file()), error.filename)
            message = f"{path} cannot be written: {file} is a file, not a folder."
        else:
            message = f"{path} cannot be written: {error.strerror}."
        raise DeltaguardError(message) from error
