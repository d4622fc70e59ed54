"""Whether a restored checkpoint is what its report says, down to the bytes."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded, read_json
from deltaguard.models.adapter import ADAPTER_FILE
from deltaguard.models.canonical import TEMPLATE, TEMPLATE_FOLDER, part_of
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.families import is_mask
from deltaguard.models.layout import ADAPTER_CONFIG, INDEX_FILE, SINGLE_FILE, is_distributed
from deltaguard.models.names import link_target, place_problem
from deltaguard.models.opened import OpenFile
from deltaguard.models.shards import TensorInfo, read_tensor
from deltaguard.reports.records.restore import REPORT_NAME, FileRow, RestoreReport, Verification
from deltaguard.restoration.verify_adapter import check_adapter

_CHUNK = 1 << 22


def verify(output_dir: str | Path) -> Verification:
    """Check a restored checkpoint: every file's hash against its report, index and shards, finite weights.

    Of an adapter, also that it fits its base model: the layers of the report, and the aligned model if it
    still lies in the folder that the report names.

    Args:
        output_dir: a folder that `restore` wrote.

    Returns:
        What was found; problems are listed, not raised.

    Raises:
        DeltaguardError: the folder holds no report that can be read, or the operating system refuses to read
            a file, so that nothing can be said.

    Example:
        ```python
        assert verify("./restored").passed
        ```
    """
    folder = expanded(output_dir)
    report = read_report(folder)
    problems = [problem for row in report.files if (problem := _file_problem(folder, row))]
    tensors: Mapping[str, TensorInfo] = {}
    unchecked: tuple[str, ...] = ()
    try:
        if report.options.get("output_format") == "adapter":
            adapter = check_adapter(folder, report)
            tensors, unchecked = adapter.tensors, adapter.unchecked
            problems += adapter.problems
        else:
            checkpoint = Checkpoint.open(folder)
            tensors = checkpoint.tensors
            problems += _name_problems(tensors.keys(), report)
            problems += _unlisted_shards(checkpoint.shards, report)
        problems += _not_finite(folder, tensors)
        problems += _unlisted(folder, report)
    except DeltaguardError as error:
        problems.append(str(error))
    return Verification(
        folder=str(folder), tensors=len(tensors), problems=tuple(problems), unchecked=unchecked
    )


def read_report(folder: Path) -> RestoreReport:
    """Read the report of a restored checkpoint.

    Raises:
        DeltaguardError: there is none, or it is damaged or of another version.
    """
    path = folder / REPORT_NAME
    if not folder.is_dir():
        raise DeltaguardError(f"There is no folder {folder}.")
    if not path.is_file():
        raise DeltaguardError(
            f"{folder} holds no {REPORT_NAME}: it was not written by `deltaguard restore`, or the restore "
            "did not finish."
        )
    return read_json(
        path, RestoreReport, remedy="Restore again, or copy the report again from where it was written."
    )


def _unlisted(folder: Path, report: RestoreReport) -> Iterator[str]:
    """Say what would be loaded with the checkpoint, or in its place, and is none of its files."""
    there = sorted((*folder.iterdir(), *folder.glob(f"{TEMPLATE_FOLDER}/*.jinja")))
    for name in loaded_besides((path.relative_to(folder).as_posix() for path in there), report):
        yield f"File {name} is not in the report, and would be loaded with the others."


def loaded_besides(names: Iterable[str], report: RestoreReport) -> Iterator[str]:
    """Find what would be loaded with a restored model, or in its place, and is none of its files.

    Args:
        names: of what lies beside its files, relative to their folder.
        report: of the model.
    """
    written = {row.name for row in report.files}
    adapter = report.options.get("output_format") == "adapter"
    others = (ADAPTER_CONFIG, ADAPTER_FILE) if not adapter else ()
    for name in names:
        is_weight = name in (SINGLE_FILE, INDEX_FILE, TEMPLATE, *others) or is_distributed(name)
        if (is_weight or part_of(name) is not None) and name not in written:
            yield name


def _unlisted_shards(shards: Iterable[str], report: RestoreReport) -> Iterator[str]:
    """Say of which files of weights the report knows nothing, so that nothing was checked of them."""
    for name in sorted(set(shards) - {row.name for row in report.files}):
        yield f"File {name} holds weights of the checkpoint, and is not in the report."


def _not_finite(folder: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name, info in tensors.items():
        if is_mask(name):
            continue
        tensor = read_tensor(OpenFile(folder / info.shard), info)
        if tensor.is_floating_point() and tensor.itemsize == 1:
            # Torch does not tell of numbers of 8 bits whether they are finite.
            tensor = tensor.float()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield f"Tensor `{name}` holds {int((~tensor.isfinite()).sum())} NaN or infinite entries."


def _name_problems(found: AbstractSet[str], report: RestoreReport) -> list[str]:
    expected = {row.name for row in (*report.layers, *report.others)}
    return [
        *(f"Tensor `{n}` is in the checkpoint and not in the report." for n in sorted(found - expected)),
        *(f"Tensor `{n}` is in the report and not in the checkpoint." for n in sorted(expected - found)),
    ]


def _file_problem(folder: Path, row: FileRow) -> str | None:
    """Say what is wrong with a file, None where it is as it was written."""
    path, problem = folder / row.name, place_problem(folder, row.name)
    if problem:
        return f"{problem}: it is not read."
    target = link_target(folder, path)
    # Weights may lie on another disk.
    if target is not None and path.suffix != ".safetensors":
        return f"File {row.name} is a link out of the folder, to {target}: it is not read."
    try:
        if not path.is_file():
            return f"File {row.name} is in the report and not in the folder."
        if path.stat().st_size != row.bytes:
            return f"File {row.name} has {path.stat().st_size} bytes; the report says {row.bytes}."
        found = _sha256(path)
    except OSError as error:
        raise DeltaguardError(f"{path} cannot be read: {error.strerror}.") from error
    return (
        None if found == row.sha256 else f"File {row.name} has sha256 {found}; the report says {row.sha256}."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
