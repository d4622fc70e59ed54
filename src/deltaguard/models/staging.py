"""Files on their way into an output folder: staged under it, flushed to disk, hashed and recorded."""

import contextlib
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from deltaguard.errors import DeltaguardError
from deltaguard.models.durable import HashedFile, explained, lock_folder
from deltaguard.models.journal import FileRecord, Journal
from deltaguard.models.layout import STAGING_FOLDER
from deltaguard.models.names import name_problem
from deltaguard.models.opened import OpenFile
from deltaguard.models.shards import DTYPES, TensorInfo, parse_header, tensor_bytes

_CHUNK = 8 << 20


class StagedFiles:
    """Files in `OUT/.deltaguard-partial`, on the file system of OUT, until they are moved into their places.

    Each is written under a temporary name, flushed to disk, renamed and recorded with its sha256.
    """

    def __init__(self, out: Path, journal: Journal) -> None:
        """Go on with what a journal records.

        Args:
            out: the output folder, in which the staging folder is.
            journal: records what is finished.
        """
        self.out = out
        self._journal = journal

    @classmethod
    @contextlib.contextmanager
    def beside(cls, out: Path, *, number: int, plan_hash: str) -> Generator[Self]:
        """Write files for the `CheckpointWriter` of another process, which knows of them by `adopt`.

        As long as the block lasts no other run begins in that folder. What was finished before a kill is
        taken over by the run that resumes this one.

        Args:
            out: the output folder, in which that writer is at work.
            number: of this process, not 0; each has another.
            plan_hash: that of the writer.

        Raises:
            DeltaguardError: the folder cannot be written to.
        """
        staging = out / STAGING_FOLDER
        with explained(out):
            lock = lock_folder(staging / "files", shared=True, shown=out)
        try:
            yield cls(out, Journal.beside(staging, number, plan_hash=plan_hash))
        finally:
            os.close(lock)

    @property
    def _staging(self) -> Path:
        return self.out / STAGING_FOLDER

    @property
    def _files(self) -> Path:
        return self._staging / "files"

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """The finished files by name, those of an interrupted run included."""
        return MappingProxyType(self._journal.records)

    def finished(self, name: str) -> FileRecord | None:
        """Look up a file that this run, or the one it resumes, has completed; None where neither has."""
        return self._journal.records.get(name)

    @contextlib.contextmanager
    def shard(self, name: str, header: bytes) -> Generator["ShardWriter"]:
        """Write one safetensors file, tensor by tensor.

        Args:
            name: the file's name.
            header: its header with the 8-byte length; the tensors must follow in its order.

        Yields:
            What the tensors are given to. If the block ends with an exception, the half-written file is
            removed; otherwise it is finished and recorded with `notes`.

        Raises:
            DeltaguardError: the file cannot be written.
            ValueError: the block ended before the last tensor of the header was written.
        """
        expected = parse_header(header, name)
        with self._staged(name, expected[-1].end if expected else len(header)) as file:
            file.write(memoryview(header))
            shard = ShardWriter(file, expected)
            yield shard
            if missing := shard.missing():
                raise ValueError(f"The shard ends before {missing[0]}.")
            file.notes = shard.notes

    def copy(self, source: Path, name: str, *, notes: Any = None) -> FileRecord:
        """Copy a file byte for byte; a symbolic link is followed.

        Args:
            source: the file.
            name: its name in the output folder; it may lie in a subfolder.
            notes: kept in the record.
        """
        opened = OpenFile(source)
        size = opened.size
        # Two buffers, because one is still being hashed while the other is filled.
        buffers = [memoryview(bytearray(min(size, _CHUNK))) for _ in range(2)]
        with self._staged(name, size) as file:
            for number, start in enumerate(range(0, size, _CHUNK)):
                chunk = buffers[number % 2][: min(_CHUNK, size - start)]
                opened.read_into(start, chunk)
                file.write(chunk)
            file.notes = notes
        return self.records[name]

    def text(self, name: str, content: str, *, notes: Any = None) -> FileRecord:
        """Write a text file in UTF-8; the arguments are those of `copy`."""
        data = content.encode()
        with self._staged(name, len(data)) as file:
            file.write(memoryview(data))
            file.notes = notes
        return self.records[name]

    @contextlib.contextmanager
    def _staged(self, name: str, size: int) -> Generator[HashedFile]:
        """One file that is recorded if the block ends well, and removed otherwise."""
        problem = name_problem(name)
        if problem:
            raise DeltaguardError(f"{problem}.")
        final = self._files / name
        with explained(self.out / name, size):
            self._journal.begin(name)
            final.parent.mkdir(parents=True, exist_ok=True)
            file = HashedFile(final.with_name(final.name + ".part"), self.out / name, size)
        try:
            yield file
            with explained(self.out / name, size):
                file.finish(final)
                self._journal.finish(FileRecord(name, file.bytes, file.digest.hexdigest(), file.notes))
        finally:
            file.close()


class ShardWriter:
    """Takes the tensors of one shard, in the order of its header.

    Attributes:
        notes: kept in the shard's record; anything that JSON can hold.
    """

    def __init__(self, file: HashedFile, expected: list[TensorInfo]) -> None:
        self.notes: Any = None
        self._file = file
        self._expected = expected
        self._written = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor.

        Args:
            name: its name, which must be the next of the header.
            tensor: with the dtype and shape that the header says, on any device. It must not be modified
                before the next call or the end of the block: it is hashed while the next one is prepared.

        Raises:
            DeltaguardError: the file cannot be written.
            ValueError: the header has another tensor at this place.
        """
        info = next(iter(self.missing()), None)
        given = (name, tensor.dtype, tuple(tensor.shape))
        if info is None or given != (info.name, DTYPES[info.dtype], info.shape):
            raise ValueError(f"{given} was given to the writer where the header of the shard has {info}.")
        self._file.write(tensor_bytes(tensor))
        self._written += 1

    def missing(self) -> list[TensorInfo]:
        """List the tensors that are still to come."""
        return self._expected[self._written :]
