"""An atomic, resumable writer of checkpoint folders: all is staged, and moved into place at the end."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter

from deltaguard.errors import DeltaguardError
from deltaguard.models.admission import WriteRequest, admit, refuse_foreign, refuse_inputs, require_space
from deltaguard.models.durable import explained, flush_folder, lock_folder
from deltaguard.models.journal import JOURNAL_NAME, FileRecord, Journal
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.models.names import inside
from deltaguard.models.staging import StagedFiles
from deltaguard.reports.records.restore import REPORT_NAME

T = TypeVar("T")


class CheckpointWriter(StagedFiles):
    """Writes a checkpoint folder so that it either loads completely or is visibly unfinished.

    Files are staged; `commit` moves them into OUT, the index (or the only weight file) last. A run that fails
    or is killed leaves its finished files staged, and the next one with `resume=True` goes on from there.
    Where nothing was finished, nothing is left behind. Other processes may write files of the same output
    (`StagedFiles.beside`), which this one then adopts.

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
        names: Collection[str] = (),
        resume: bool = False,
        overwrite: bool = False,
        protected: Iterable[Path] = (),
    ) -> None:
        """Check the output folder and make or reopen the staging folder in it.

        Args:
            out: the output folder; made, with its parents, if absent.
            plan_hash: identifies what is written; a resumed run must have the same.
            names: of the files that will be written, where known: what is in their way is found now, and
                otherwise at the commit.
            resume: go on with what an interrupted run finished; where nothing is staged, the run starts. A
                run begun with `overwrite` may be resumed without it.
            overwrite: replace a checkpoint in `out`: the files that its report lists are removed, at the
                commit; all others stay. What another run has staged is discarded, unless it is resumed.
            protected: folders of inputs, which must neither be, contain, nor lie in `out`.

        Raises:
            DeltaguardError: `out` is or overlaps an input, holds what must not be replaced, cannot be
                written, or holds the progress of another plan; or another process is writing to it.
        """
        self.out = Path(out).absolute()
        self._committed = False
        refuse_inputs(self.out, protected)
        with explained(self.out):
            self._made = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.out)
        try:
            self._journal = self._begin(plan_hash, WriteRequest(names, plan_hash, resume, overwrite))
        except BaseException:
            self._remove_made()
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        journal = self._journal
        if not self._committed and not self.records and not journal.has_found_out and journal.is_alone:
            self._give_up()
        os.close(self._lock)

    def remembered(self, name: str, schema: TypeAdapter[T]) -> T | None:
        """Look up what this run, or the one it resumes, remembered under a name; None where neither has.

        Raises:
            DeltaguardError: the progress of an interrupted run is damaged.
        """
        return self._journal.remembered(name, schema)

    def notes(self, record: FileRecord, schema: TypeAdapter[T]) -> T:
        """Look up what was noted about a finished file.

        Raises:
            DeltaguardError: the progress of an interrupted run is damaged.
        """
        return self._journal.notes(record, schema)

    def damaged(self, what: str, wrong: list[str]) -> DeltaguardError:
        """Make the error for progress of an interrupted run that does not fit this one."""
        return self._journal.refusal(what, wrong)

    def remember(self, name: str, value: Any) -> None:
        """Keep something that took long to find out, which JSON can hold, in case the run is interrupted."""
        with explained(self.out):
            self._journal.remember(name, value)

    def require_space(self, total: int, *, what: str = "") -> None:
        """Refuse to start where the disk is too small for `total` bytes, less those of finished files."""
        require_space(self.out, total - sum(record.bytes for record in self.records.values()), what=what)

    def adopt(self, record: FileRecord) -> None:
        """Take over a file that another process has finished.

        Raises:
            DeltaguardError: it is not there as that process said.
        """
        path = self._files / record.name
        with explained(self.out / record.name):
            found = path.stat().st_size
            if found != record.bytes:
                raise DeltaguardError(
                    f"{path} has {found:,} bytes, and the process that wrote it said {record.bytes:,}. Do "
                    "all see the same file system? Run the same command again with `--resume`."
                )
            self._journal.finish(record)

    def commit(self, last: str) -> None:
        """Move every finished file into the output folder and remove the staging folder.

        The files of a checkpoint that is being replaced are removed first. A commit that was interrupted is
        completed by a resumed run that calls it again.

        Args:
            last: the file without which the folder does not load: the index, or the only weight file. It is
                moved when everything else is on disk.

        Raises:
            DeltaguardError: a file cannot be moved, or something has come to lie in its place that deltaguard
                did not write; what was staged stays.
        """
        if last not in self.records:
            raise ValueError(f"{last} was not written, so there is nothing to commit.")
        with explained(self.out):
            own = (self._journal.replaces or frozenset()) | self._journal.moved
            refuse_foreign(self.out, (name for name in self.records if self._is_staged(name)), own)
            self._journal.commit()
            # First goes the index, or else the weights: what is left without them is visibly unfinished.
            needed = {
                name for name in own if name.endswith(".safetensors.index.json") or name == ADAPTER_CONFIG
            }
            needed = needed or {name for name in own if "/" not in name and name.endswith(".safetensors")}
            for name in (*sorted(needed), *sorted(own - needed)):
                self._remove(name)
            for name in sorted(self.records.keys() - {last}):
                self._move(name)
            self._move(last)
            # The journal goes last: as long as anything else is left, the run can be resumed.
            shutil.rmtree(self._files, ignore_errors=not self._files.exists())
            shutil.rmtree(self._staging)
        self._committed = True

    def discard(self) -> None:
        """Give up what was staged: the result is of no use, so there is nothing to resume."""
        replaces = (self._journal.replaces or frozenset()) | self._journal.moved
        self._journal.records.clear()
        self._give_up()
        if self._staging.exists():
            with explained(self.out):
                path = self._staging / JOURNAL_NAME
                self._journal = Journal.create(path, plan_hash=self._journal.plan_hash, replaces=replaces)
                shutil.rmtree(self._files)
                self._files.mkdir()

    def _begin(self, plan_hash: str, request: WriteRequest) -> Journal:
        """Find the journal of the run that is resumed, or of a new one."""
        with explained(self.out):
            admission = admit(self.out, request)
            new = not self._staging.exists()
            # A process that wrote beside a run that is gone may still be at work.
            lock = lock_folder(self._files, shown=self.out) if self._files.is_dir() else None
        try:
            with explained(self.out):
                journal = admission.journal
                if journal is None:
                    self._staging.mkdir(parents=True, exist_ok=True)
                    if self._files.exists():
                        shutil.rmtree(self._files)
                    path = self._staging / JOURNAL_NAME
                    journal = Journal.create(path, plan_hash=plan_hash, replaces=admission.replaces)
                # A kill may have come before it was made, or after it was removed.
                self._files.mkdir(exist_ok=True)
                journal.settle()
                self._tidy(journal)
        except BaseException:
            if new:
                self._remove_staging()
            raise
        finally:
            if lock is not None:
                os.close(lock)
        return journal

    def _tidy(self, journal: Journal) -> None:
        """Remove half-written files and links, and forget finished files that are not there any more."""
        for path in list(self._files.rglob("*")):
            if path.is_symlink() or (path.suffix == ".part" and path.is_file()):
                path.unlink()
        for record in list(journal.records.values()):
            path = self._files / record.name
            if record.name in journal.moved and not path.exists():
                path = inside(self.out, record.name)
            if path.is_symlink() or not path.is_file() or path.stat().st_size != record.bytes:
                journal.begin(record.name)

    def _is_staged(self, name: str) -> bool:
        return (self._files / name).exists()

    def _remove(self, name: str) -> None:
        """Remove a file of the checkpoint that is being replaced, and the folders that are empty then."""
        path = inside(self.out, name)
        moved = name in self.records and not self._is_staged(name)
        if moved or not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
            return
        path.unlink()
        for parent in path.relative_to(self.out).parents[:-1]:
            with contextlib.suppress(OSError):
                (self.out / parent).rmdir()

    def _move(self, name: str) -> None:
        # A resumed commit finds the files that were moved before it was interrupted in place.
        if self._is_staged(name):
            target = inside(self.out, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (self._files / name).replace(target)
            flush_folder(target.parent)

    def _give_up(self) -> None:
        """Remove the staging folder, unless its journal alone knows what the next run may replace."""
        if not self._journal.replaces or (self.out / REPORT_NAME).exists():
            self._remove_staging()

    def _remove_staging(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()
