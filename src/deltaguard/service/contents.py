"""The contents of files, by id: in the data folder, or in an object store that fsspec knows."""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fsspec.core import url_to_fs

from deltaguard.errors import DeltaguardError
from deltaguard.models.durable import explained, flush_folder

_PART = 1 << 20
_OWNER = "deltaguard-service"
"""What an object store keeps the id of the service under, whose contents it has."""


class UnavailableError(DeltaguardError):
    """An object store that does not answer now, and may a moment later."""


@dataclass(frozen=True)
class Content:
    """A content that is kept.

    Attributes:
        name: the id of its file; another one, where it was left behind unfinished.
        bytes: its size.
        changed_at: seconds since 1970.
    """

    name: str
    bytes: int
    changed_at: float


class Contents(Protocol):
    """Where contents are kept."""

    def put(self, name: str, source: BinaryIO) -> int:
        """Keep a content; when this returns it is there whole, and stays.

        Returns:
            Its bytes.

        Raises:
            UnavailableError: an object store does not answer.
            DeltaguardError: it cannot be written.
        """
        ...

    def parts(self, name: str) -> Iterator[bytes]:
        """Read a content, a part at a time.

        Raises:
            FileNotFoundError: there is none of that name.
            UnavailableError: an object store does not answer.
        """
        ...

    def fetch(self, name: str, folder: Path) -> Path:
        """Have a content as a file.

        Args:
            name: the id of its file.
            folder: receives it, where it is not on this machine already.

        Raises:
            FileNotFoundError: there is none of that name.
            UnavailableError: an object store does not answer.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a content, unless it is gone."""
        ...

    def all(self) -> Iterator[Content]:
        """List what is kept, unfinished uploads included."""
        ...

    def require_owner(self, service: str, *, claims: bool = False) -> None:
        """Refuse a place whose contents are another service's.

        Args:
            service: the id of this one.
            claims: whether a place that is nobody's becomes this one's.

        Raises:
            UnavailableError: an object store does not answer.
            DeltaguardError: the place is another service's; or nobody's, and is not claimed.
        """
        ...


@dataclass(frozen=True)
class FolderContents:
    """Contents in a folder of this machine.

    Attributes:
        folder: it exists.
    """

    folder: Path

    def put(self, name: str, source: BinaryIO) -> int:
        """Keep a content: it is on disk, under its name, when this returns."""
        target = self.folder / name
        partial = target.with_suffix(".partial")
        try:
            with explained(target), partial.open("wb") as kept:
                shutil.copyfileobj(source, kept, _PART)
                kept.flush()
                os.fsync(kept.fileno())
                size = kept.tell()
            partial.replace(target)
            flush_folder(self.folder)
        finally:
            partial.unlink(missing_ok=True)
        return size

    def parts(self, name: str) -> Iterator[bytes]:
        """Read a content, a part at a time."""
        with (self.folder / name).open("rb") as file:
            while part := file.read(_PART):
                yield part

    def fetch(self, name: str, folder: Path) -> Path:  # noqa: ARG002  # it is here
        """Name the file itself."""
        path = self.folder / name
        if not path.exists():
            raise FileNotFoundError(path)
        return path

    def remove(self, name: str) -> None:
        """Remove a content, unless it is gone."""
        (self.folder / name).unlink(missing_ok=True)

    def require_owner(self, service: str, *, claims: bool = False) -> None:
        """Do nothing: the folder is in the service's own."""

    def all(self) -> Iterator[Content]:
        """List what is kept, unfinished uploads included."""
        # Before the first upload there is no folder.
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # Removed meanwhile.
            yield Content(path.name, found.st_size, found.st_mtime)


@dataclass(frozen=True)
class RemoteContents:
    """Contents in an object store, which keeps a content whole or not at all.

    Attributes:
        system: of fsspec.
        root: what names begin with there.
    """

    system: Any
    root: str

    def put(self, name: str, source: BinaryIO) -> int:
        """Keep a content: the store has it when this returns."""
        size = 0
        with self._answers():
            kept = self.system.open(self._path(name), "wb", autocommit=False)
        try:
            while part := source.read(_PART):
                size += len(part)
                with self._answers():
                    kept.write(part)
            with self._answers():
                kept.close()
                kept.commit()
        except BaseException:
            # A store that is away cannot be told so; what was sent is no content of its own.
            with suppress(Exception):
                kept.close()
                kept.discard()
            raise
        return size

    def parts(self, name: str) -> Iterator[bytes]:
        """Read a content, a part at a time."""
        with self._answers(may_be_absent=True), self.system.open(self._path(name), "rb") as file:
            while part := file.read(_PART):
                yield part

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring a content here, unless that was done before."""
        target = folder / name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            try:
                with partial.open("wb") as file:
                    for part in self.parts(name):
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
                flush_folder(folder)
            finally:
                partial.unlink(missing_ok=True)
        return target

    def remove(self, name: str) -> None:
        """Remove a content, unless it is gone."""
        with self._answers():
            if self.system.exists(self._path(name)):
                self.system.rm_file(self._path(name))

    def require_owner(self, service: str, *, claims: bool = False) -> None:
        """Refuse a place whose contents are another service's: to this one they would be garbage."""
        try:
            owner = b"".join(self.parts(_OWNER)).decode()
        except FileNotFoundError:
            if not claims:
                raise DeltaguardError(
                    f"No service has said that {self.root} is its own, which `deltaguard serve` does when it "
                    "starts: start this one with it first."
                ) from None
            self.put(_OWNER, BytesIO(service.encode()))
            return
        if owner != service:
            raise DeltaguardError(
                f"{self.root} is another service's, and cleaning up would remove its files: give each a "
                f"prefix of its own in `files_url`. If this service takes its place, remove {_OWNER} there."
            )

    def all(self) -> Iterator[Content]:
        """List what is kept."""
        with self._answers():
            self.system.invalidate_cache()
            for each in self._listed():
                changed_at = self.system.modified(each["name"]).timestamp()
                yield Content(each["name"].rsplit("/", 1)[-1], each["size"], changed_at)

    def _listed(self) -> list[dict[str, Any]]:
        try:
            found = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return []  # Before the first upload.
        return [each for each in found if each["type"] == "file" and not each["name"].endswith(f"/{_OWNER}")]

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _answers(self, *, may_be_absent: bool = False) -> Generator[None, None, None]:
        """Turn what a store's own library raises into errors of ours.

        Args:
            may_be_absent: whether what is asked for may not be there, a FileNotFoundError; else it is the
                place as a whole that is missing.

        Raises:
            UnavailableError: the store does not answer.
            DeltaguardError: it refuses, or has no such place.
        """
        try:
            yield
        except FileNotFoundError as error:
            if may_be_absent:
                raise
            raise DeltaguardError(f"The object store has no {self.root}: {error}.") from error
        except PermissionError as error:
            raise DeltaguardError(f"The object store does not let us into {self.root}: {error}.") from error
        except Exception as error:
            # Python's own, but for those of the operating system, are bugs; botocore has others of its own.
            if type(error).__module__ == "builtins" and not isinstance(error, OSError):
                raise
            raise UnavailableError(f"The object store of {self.root} does not answer: {error}") from error


def open_contents(data: Path, url: str | None) -> Contents:
    """Open where contents are kept.

    Args:
        data: the service's folder.
        url: such as `s3://bucket/prefix`; None is a folder in `data`.

    Raises:
        DeltaguardError: fsspec knows no such store, or needs a package for it.
    """
    if url is None:
        return FolderContents(data / "files")
    try:
        system, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DeltaguardError(f"`files_url` cannot be opened: {error}") from error
    return RemoteContents(system, root.rstrip("/"))
