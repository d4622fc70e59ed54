"""Files held open, so that what is read is one file from beginning to end, whatever happens to its name."""

import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from deltaguard.errors import DeltaguardError, listed

_AT_ONCE = 1 << 20


class _Signature(NamedTuple):
    """What tells a file from another one, and from itself once it was changed."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class OpenFile:
    """A file for reading, open as long as this object lives; any number of threads may read at once.

    Attributes:
        path: where it lay when it was opened.
        size: bytes it had then.

    Example:
        >>> file = OpenFile(Path("model.safetensors"))  # doctest: +SKIP
        >>> header = bytearray(8)  # doctest: +SKIP
        >>> file.read_into(0, memoryview(header))  # doctest: +SKIP
        >>> file.check_unchanged()  # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            DeltaguardError: it is gone or cannot be read.
        """
        self.path = path
        try:
            # A pipe is not waited for.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DeltaguardError(f"{path} cannot be read: {error.strerror}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._opened = _Signature.of(os.fstat(self._descriptor))
        self.size = self._opened.size

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `start` on.

        Raises:
            DeltaguardError: the file cannot be read, or ends before `target` is full.
        """
        done = 0
        try:
            # So little at a time is still in the cache where fresh memory was zeroed for it.
            while done < len(target):
                count = os.preadv(self._descriptor, [target[done : done + _AT_ONCE]], start + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise DeltaguardError(f"{self.path} cannot be read: {error.strerror}.") from error
        if done < len(target):
            raise DeltaguardError(
                f"{self.path} ends at byte {start + done:,}; {start + len(target):,} are needed. "
                "It was changed while deltaguard was using it: run again once it is complete."
            )

    def change(self) -> str | None:
        """Say what happened to the file since it was opened; None where nothing did."""
        return _change(self.path, self._opened, _Signature.of(os.fstat(self._descriptor)))


@dataclass(frozen=True)
class Snapshot:
    """Signatures of small files that are read, and perhaps copied, at more than one time."""

    _listed: Callable[[], Iterable[Path]]
    _seen: dict[Path, _Signature]
    _decides: Callable[[Path], bool]

    @classmethod
    def of(
        cls, listed: Callable[[], Iterable[Path]], *, decides: Callable[[Path], bool] = lambda _: True
    ) -> Self:
        """Note what files are now.

        Args:
            listed: lists them, now and later; those that are absent are left out.
            decides: whether one that comes later makes a difference.
        """
        return cls(listed, {path: _Signature.of(path.stat()) for path in listed() if path.is_file()}, decides)

    @property
    def paths(self) -> list[Path]:
        """The files that were there, as they were listed."""
        return list(self._seen)

    def changes(self) -> list[str]:
        """Say what happened to each file since then, and which have come."""
        changed = [change for path, seen in self._seen.items() if (change := _change(path, seen))]
        come = [path for path in self._listed() if path not in self._seen and path.is_file()]
        return changed + [f"{path} was added" for path in come if self._decides(path)]


def refuse_changes(changes: Iterable[str | None]) -> None:
    """Refuse what was made from files that changed meanwhile: it may be half of one and half of another.

    Args:
        changes: what `OpenFile.change` and `Snapshot.changes` said.

    Raises:
        DeltaguardError: at least one of them is a change; all are listed.
    """
    found = [change for change in changes if change]
    if found:
        raise DeltaguardError(
            listed("Inputs were changed while they were read, so the result would be of no one model", found)
            + "\nRun again once they are complete."
        )


def _change(path: Path, before: _Signature, held: _Signature | None = None) -> str | None:
    try:
        now = _Signature.of(path.stat())
    except OSError as error:
        return f"{path}: {error.strerror}"
    # Of a file that is not held open, file systems of other machines and of programs may number it anew.
    is_copy = held is None and (now.size, now.modified) == (before.size, before.modified)
    if is_copy:
        return None
    if (now.device, now.inode) != (before.device, before.inode):
        return f"{path} was replaced by another file"
    if now.size != before.size:
        return f"{path} had {before.size:,} bytes and has {now.size:,}"
    if now != before or held not in (None, before):
        return f"{path} was written to"
    return None
