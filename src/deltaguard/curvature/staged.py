"""Folders of a store that are complete or absent, and files of tensors that are on disk once written."""

import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded
from deltaguard.models.durable import explained, flush_folder, lock_folder


@contextmanager
def staged_folder(folder: Path) -> Generator[Path]:
    """Make a temporary sibling that takes the folder's place when the block ends well, and is removed else.

    Raises:
        DeltaguardError: the folder is a file, or not empty.
    """
    folder = expanded(folder).resolve()
    require_empty(folder)
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.staged")
    with explained(staged):
        staged.mkdir(exist_ok=True)
    lock = lock_folder(staged)
    try:
        # A run that was killed leaves its files there.
        for path in staged.iterdir():
            path.unlink()
        yield staged
        with explained(folder):
            if folder.exists():
                folder.rmdir()
            flush_folder(staged)
            staged.rename(folder)
            flush_folder(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(lock)


def require_empty(folder: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        DeltaguardError: the folder is a file, a mount point, or not empty.
    """
    if folder.is_mount():
        raise DeltaguardError(f"The output {folder} is a mount point; name a folder in it.")
    if folder.is_file():
        raise DeltaguardError(f"The output {folder} is a file; a folder is written. Choose another name.")
    if folder.exists() and any(folder.iterdir()):
        raise DeltaguardError(f"The output folder {folder} is not empty. Choose another one, or empty it.")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file and wait until it is on disk.

    Raises:
        DeltaguardError: the operating system refuses, as it does on a full disk.
    """
    with explained(path, sum(tensor.nbytes for tensor in tensors.values())):
        try:
            save_file(dict(tensors), path)
        except SafetensorError as error:
            if refused := re.search(r"os error (\d+)", str(error)):
                number = int(refused[1])
                raise OSError(number, os.strerror(number)) from error
            raise DeltaguardError(f"{path} cannot be written: {error}.") from error
        # A file system over a network may tell only here that it is full.
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
