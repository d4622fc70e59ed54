"""The files of a store, opened once and read once from beginning to end: what comes out is a valid store."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaguard.curvature.checks import Expected, expected_tensors, manifest_problems
from deltaguard.curvature.store_format import MANIFEST, Manifest, StoredFile
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.opened import OpenFile
from deltaguard.models.shards import DTYPES, TensorInfo, parse_header, read_header, shard_problem


@dataclass(frozen=True)
class Opened:
    """The tensors of a store.

    Attributes:
        files: its files by name, held open.
        tensors: where each tensor lies, by name.
    """

    files: Mapping[str, OpenFile]
    tensors: Mapping[str, TensorInfo]


def open_files(folder: Path, manifest: Manifest) -> Opened:
    """Open the files that a manifest names, read each once, and check all that can be known of it.

    Args:
        folder: where they lie.
        manifest: of the store.

    Raises:
        DeltaguardError: the manifest contradicts itself, a file is not the one that was written, or its
            numbers are no curvature. All problems are listed.
    """
    _refuse(folder, manifest, manifest_problems(manifest))
    expected = expected_tensors(manifest)
    problems: list[str] = []
    files: dict[str, OpenFile] = {}
    tensors: dict[str, TensorInfo] = {}
    for stored in manifest.files:
        file = _opened(folder, stored)
        if isinstance(file, str):
            problems.append(file)
            continue
        infos = parse_header(read_header(file), stored.name)
        own = {name: known for name, known in expected.items() if known.shard == stored.name}
        unfit = _header_problems(stored, infos, own)
        if file.size != stored.bytes:
            unfit.append(f"{stored.name} has {file.size:,} bytes; {MANIFEST} says {stored.bytes:,}")
        problems += unfit or _content_problems(file, stored, infos, own)
        files[stored.name] = file
        tensors |= {info.name: info for info in infos}
    _refuse(folder, manifest, problems)
    return Opened(files, tensors)


def _refuse(folder: Path, manifest: Manifest, problems: list[str]) -> None:
    if problems:
        again = f"`deltaguard calibrate {manifest.provenance.aligned} -o STORE`"
        raise DeltaguardError(
            listed(f"The store {folder} is damaged", problems)
            + f"\nCopy it again, or calibrate again: {again}."
        )


def _opened(folder: Path, stored: StoredFile) -> OpenFile | str:
    """A file of the store, or why it cannot be one."""
    path = folder / stored.name
    if not path.is_file():
        return f"the file {stored.name} is missing"
    if not _lies_in(path, folder):
        return f"{stored.name} is a link to {path.resolve()}, outside the store's folder"
    return shard_problem(path) or OpenFile(path)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, or where the Hub's cache puts the files of a folder that it made."""
    real, root = path.resolve().parent, folder.resolve()
    return real == root or (root.parent.name == "snapshots" and real == root.parent.parent / "blobs")


def _header_problems(
    stored: StoredFile, infos: list[TensorInfo], expected: Mapping[str, Expected]
) -> list[str]:
    """What a file holds that it should not, or not so, and what it lacks."""
    problems = [
        f"`{name}` is missing in {stored.name}" for name in sorted(expected.keys() - {i.name for i in infos})
    ]
    for info in infos:
        known = expected.get(info.name)
        if known is None:
            problems.append(f"`{info.name}` does not belong in {stored.name}")
        elif (known.form.dtype, known.form.shape) != (DTYPES.get(info.dtype), info.shape):
            found = f"{DTYPES.get(info.dtype, info.dtype)} {info.shape}".removeprefix("torch.")
            problems.append(f"`{info.name}` is {found}; it should be {known.form}")
    return problems


def _content_problems(
    file: OpenFile, stored: StoredFile, infos: list[TensorInfo], expected: Mapping[str, Expected]
) -> list[str]:
    """What is wrong with the bytes of a file and the numbers in them, all of which are read once."""
    problems: list[str] = []
    digest = hashlib.sha256(read_header(file))
    # Fresh memory for every tensor would take longer than reading it.
    buffer = torch.empty(max(info.nbytes for info in infos), dtype=torch.uint8)
    with ThreadPoolExecutor(1, thread_name_prefix="hasher") as hasher:
        for info in infos:
            data = buffer[: info.nbytes]
            file.read_into(info.start, data.numpy().data)
            hashed = hasher.submit(digest.update, data.numpy().data)
            problem = expected[info.name].problem(data.view(DTYPES[info.dtype]).reshape(info.shape))
            if problem:
                problems.append(f"`{info.name}` {problem}")
            hashed.result()
    if digest.hexdigest() != stored.sha256:
        problems.append(
            f"{stored.name} is not the file that was written: its sha256 is {digest.hexdigest()}, and "
            f"{MANIFEST} says {stored.sha256}"
        )
    return problems
