"""An atomic, resumable writer of checkpoint folders: all is staged, and moved into place at the end."""

import contextlib
import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType
from typing import Any, Self

from torch import Tensor

from deltaguard.checkpoints.durable import HashedFile, explained, flush_folder, lock_folder
from deltaguard.checkpoints.journal import FileRecord, Journal
from deltaguard.checkpoints.layout import STAGING_FOLDER
from deltaguard.checkpoints.opened import OpenFile
from deltaguard.checkpoints.shards import DTYPES, TensorInfo, parse_header, tensor_bytes
from deltaguard.errors import DeltaguardError

_CHUNK = 8 << 20
# The index goes first: what is left of a checkpoint without it is visibly unfinished.
_REPLACED = (
    "*.safetensors.index.json",
    "*.safetensors",
    "adapter_config.json",
    "deltaguard_report.json",
)


class CheckpointWriter:
    """Writes a checkpoint folder so that it either loads completely or is visibly unfinished.

    Files are staged in `OUT/.deltaguard-partial`, on the same file system: each is written under a temporary
    name, flushed to disk, renamed and recorded with its sha256. `commit` moves them into OUT, the index (or
    the only weight file) last. A run that fails or is killed leaves its finished files staged, and the next
    one with `resume=True` goes on from there. Where nothing was finished, nothing is left behind.

    Example:
        >>> with CheckpointWriter("out", plan_hash=plan, resume=True) as writer:  # doctest: +SKIP
        ...     if writer.finished("model.safetensors") is None:
        ...         with writer.shard("model.safetensors", checkpoint.header("model.safetensors")) as shard:
        ...             for name in checkpoint.tensors:
        ...                 shard.write(name, checkpoint.read(name))
        ...             shard.notes = {"layers": 32}
        ...     writer.copy(checkpoint.folder / "config.json", "config.json")
        ...     writer.commit(last="model.safetensors")
    """

    def __init__(
        self,
        out: str | Path,
        *,
        plan_hash: str,
        resume: bool = False,
        overwrite: bool = False,
        protected: Iterable[Path] = (),
    ) -> None:
        """Check the output folder and make or reopen the staging folder in it.

        Args:
            out: the output folder; made, with its parents, if absent.
            plan_hash: identifies what is written; a resumed run must have the same.
            resume: go on with what an interrupted run finished. Where nothing is staged, the run simply
                starts. A run begun with `overwrite` may be resumed without it.
            overwrite: replace a checkpoint in `out`: its weights, index and report are removed, at the
                commit. Other files stay unless the new checkpoint has one of the same name. What another
                run has staged is discarded, unless `resume` is given too.
            protected: folders of inputs, which must neither be, contain, nor lie in `out`.

        Raises:
            DeltaguardError: `out` is or overlaps an input, is not empty, cannot be written, or holds the
                progress of another plan; or another process is writing to it.
        """
        self.out = Path(out).expanduser().absolute()
        self._staging = self.out / STAGING_FOLDER
        self._files = self._staging / "files"
        self._committed = False
        _refuse_inputs(self.out, protected)
        with explained(self.out):
            self._made = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.out)
        try:
            self._journal = self._begin(plan_hash, resume=resume, overwrite=overwrite)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed and not self.records and not self._journal.remembered:
            self._remove_staging()
        os.close(self._lock)

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """The finished files by name, those of an interrupted run included."""
        return MappingProxyType(self._journal.records)

    def finished(self, name: str) -> FileRecord | None:
        """The record of a file that is complete, in this run or the one it resumes, or None."""
        return self._journal.records.get(name)

    def remembered(self, name: str) -> Any:
        """What this run or the one it resumes found out under a name, or None."""
        return self._journal.remembered.get(name)

    def remember(self, name: str, value: Any) -> None:
        """Keep something that took long to find out for the case that the run is interrupted.

        Args:
            name: of it.
            value: anything that JSON can hold.
        """
        with explained(self.out):
            self._journal.remember(name, value)

    def require_space(self, total: int) -> None:
        """Refuse to start where the disk is too small.

        Args:
            total: bytes of all files to write; those already finished are not counted again.

        Raises:
            DeltaguardError: with the bytes needed and free.
        """
        needed = total - sum(record.bytes for record in self.records.values())
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise DeltaguardError(
                f"{self.out} needs {needed:,} bytes, and {free:,} are free there: "
                "free some space or choose another output folder."
            )

    @contextlib.contextmanager
    def shard(self, name: str, header: bytes) -> Generator["ShardWriter", None, None]:
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
            shard.check_complete()
            file.notes = shard.notes

    def copy(self, source: Path, name: str, *, notes: Any = None) -> FileRecord:
        """Copy a file byte for byte; a symbolic link is followed.

        Args:
            source: the file.
            name: its name in the output folder; it may lie in a subfolder.
            notes: kept in the record.

        Raises:
            DeltaguardError: the source cannot be read or the copy not written.
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
        """Write a text file in UTF-8.

        Args:
            name: its name in the output folder.
            content: all of it.
            notes: kept in the record.

        Raises:
            DeltaguardError: the file cannot be written.
        """
        data = content.encode()
        with self._staged(name, len(data)) as file:
            file.write(memoryview(data))
            file.notes = notes
        return self.records[name]

    def commit(self, last: str) -> None:
        """Move every finished file into the output folder and remove the staging folder.

        Weights, index and report of a checkpoint that is being replaced are removed first. A commit that
        was interrupted is completed by a resumed run that calls it again.

        Args:
            last: the file without which the folder does not load: the index, or the only weight file. It is
                moved when everything else is on disk.

        Raises:
            DeltaguardError: a file cannot be moved.
        """
        if last not in self.records:
            raise ValueError(f"{last} was not written, so there is nothing to commit.")
        with explained(self.out):
            self._journal.commit()
            self._remove_replaced()
            for name in sorted(self.records.keys() - {last}):
                self._move(name)
            self._move(last)
            # The journal goes last: as long as anything else is left, the run can be resumed.
            shutil.rmtree(self._files)
            shutil.rmtree(self._staging)
        self._committed = True

    def discard(self) -> None:
        """Give up what was staged: the result is of no use, so there is nothing to resume."""
        self._journal.records.clear()
        self._remove_staging()

    @contextlib.contextmanager
    def _staged(self, name: str, size: int) -> Generator[HashedFile, None, None]:
        """One file that is recorded if the block ends well, and removed otherwise."""
        final = self._files / _inside(name)
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

    def _begin(self, plan_hash: str, *, resume: bool, overwrite: bool) -> Journal:
        """The journal of the run that is resumed, or of a new one."""
        with explained(self.out):
            journal = self._resumable(plan_hash) if resume else None
            overwrite = overwrite or (journal is not None and journal.overwrite)
            if not overwrite:
                self._refuse_occupied(journal, resume=resume)
        try:
            with explained(self.out):
                self._journal = journal or self._start(plan_hash, overwrite=overwrite)
                self._tidy()
        except BaseException:
            if journal is None:
                self._remove_staging()
            raise
        return self._journal

    def _resumable(self, plan_hash: str) -> Journal | None:
        journal = Journal.load(self._staging / "journal.jsonl")
        if journal is not None and journal.plan_hash != plan_hash:
            raise DeltaguardError(
                f"{self._staging} holds the progress of another plan ({journal.plan_hash}; this one is "
                f"{plan_hash}): the models or the options differ. "
                "Resume with the same ones, or start again with --overwrite and without --resume."
            )
        return journal

    def _refuse_occupied(self, journal: Journal | None, *, resume: bool) -> None:
        """Refuse a folder with content that neither this run nor the one it resumes put there."""
        if journal is not None and journal.committing:
            return
        names = sorted(path.name for path in self.out.iterdir()) if self.out.exists() else []
        if STAGING_FOLDER in names and not resume:
            raise DeltaguardError(
                f"{self.out} holds the progress of an unfinished run: "
                "go on with --resume, or start again with --overwrite."
            )
        others = [name for name in names if name != STAGING_FOLDER]
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            nothing = " and there is nothing to resume" if resume and journal is None else ""
            raise DeltaguardError(
                f"{self.out} is not empty ({shown}){nothing}. Choose another output folder, "
                "or replace the checkpoint in it with --overwrite."
            )

    def _start(self, plan_hash: str, *, overwrite: bool) -> Journal:
        if self._staging.exists():
            shutil.rmtree(self._staging)
        self._files.mkdir(parents=True)
        return Journal.create(self._staging / "journal.jsonl", plan_hash=plan_hash, overwrite=overwrite)

    def _tidy(self) -> None:
        """Remove half-written files, and forget finished ones that are not there any more."""
        for part in self._files.rglob("*.part"):
            part.unlink()
        for record in list(self._journal.records.values()):
            path = self._files / record.name
            if self._journal.committing and not path.exists():
                path = self.out / record.name
            if not path.is_file() or path.stat().st_size != record.bytes:
                self._journal.begin(record.name)

    def _remove_replaced(self) -> None:
        for pattern in _REPLACED:
            for path in self.out.glob(pattern):
                moved = path.name in self.records and not (self._files / path.name).exists()
                if not moved:
                    path.unlink()

    def _move(self, name: str) -> None:
        staged, target = self._files / name, self.out / name
        # A resumed commit finds the files that were moved before it was interrupted in place.
        if staged.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)
            flush_folder(target.parent)

    def _remove_staging(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


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
        info = self._expected[self._written] if self._written < len(self._expected) else None
        given = (name, tensor.dtype, tuple(tensor.shape))
        if info is None or given != (info.name, DTYPES[info.dtype], info.shape):
            raise ValueError(f"{given} was given to the writer where the header of the shard has {info}.")
        self._file.write(tensor_bytes(tensor))
        self._written += 1

    def check_complete(self) -> None:
        """Refuse to finish a shard that lacks tensors of its header.

        Raises:
            ValueError: with the next tensor that was expected.
        """
        if self._written < len(self._expected):
            raise ValueError(f"The shard ends before {self._expected[self._written]}.")


def _refuse_inputs(out: Path, protected: Iterable[Path]) -> None:
    real = out.resolve()
    for folder in protected:
        other = folder.expanduser().resolve()
        if real == other or real in other.parents or other in real.parents:
            relation = "is" if real == other else "contains" if real in other.parents else "lies in"
            raise DeltaguardError(
                f"The output folder {out} {relation} the input {folder}, which would be damaged: "
                "choose another output folder."
            )


def _inside(name: str) -> PurePosixPath:
    """A file's path within the output folder, refused where it would lead out of it."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0] == STAGING_FOLDER:
        raise DeltaguardError(f"{name!r} is no name for a file in the output folder.")
    return path
