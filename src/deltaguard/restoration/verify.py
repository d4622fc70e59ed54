"""Whether a restored checkpoint is what its report says, down to the bytes."""

import hashlib
from collections.abc import Set as AbstractSet
from pathlib import Path

from deltaguard.checkpoints.checkpoint import Checkpoint
from deltaguard.checkpoints.opened import OpenFile
from deltaguard.checkpoints.shards import read_tensor
from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.report.restore import REPORT_NAME, RestoreReport, Verification
from deltaguard.restoration.verify_adapter import check_adapter

_CHUNK = 1 << 22


def verify(output_dir: str | Path) -> Verification:
    """Check a restored checkpoint: index and shards, finite weights, and hashes against its report.

    Of an adapter, also that it fits its base model: the layers of the report, and the aligned model if it
    still lies in the folder that the report names.

    Args:
        output_dir: a folder that `restore` wrote.

    Returns:
        What was found; problems are listed, not raised.

    Raises:
        DeltaguardError: the folder holds no report, or no checkpoint that can be opened.

    Example:
        ```python
        assert verify("./restored").passed
        ```
    """
    folder = Path(output_dir)
    report = read_report(folder)
    problems = _file_problems(folder, report)
    unchecked: tuple[str, ...] = ()
    if report.options.get("output_format") == "adapter":
        adapter = check_adapter(folder, report)
        tensors, unchecked = adapter.tensors, adapter.unchecked
        problems += adapter.problems
    else:
        tensors = Checkpoint.open(folder).tensors
        problems += _name_problems(tensors.keys(), report)
    for name, info in tensors.items():
        tensor = read_tensor(OpenFile(folder / info.shard), info)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            problems.append(
                f"Tensor `{name}` holds {int((~tensor.isfinite()).sum())} NaN or infinite entries."
            )
    return Verification(
        folder=str(folder), tensors=len(tensors), problems=tuple(problems), unchecked=unchecked
    )


def read_report(folder: Path) -> RestoreReport:
    """The report of a restored checkpoint.

    Raises:
        DeltaguardError: there is none, or it is of another version.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        raise DeltaguardError(
            f"{folder} holds no {REPORT_NAME}: it was not written by `deltaguard restore`, or the restore "
            "did not finish."
        )
    return read_json(path, RestoreReport, remedy="Restore again, with this release of deltaguard.")


def _name_problems(found: AbstractSet[str], report: RestoreReport) -> list[str]:
    expected = {row.name for row in (*report.layers, *report.others)}
    return [
        *(f"Tensor `{n}` is in the checkpoint and not in the report." for n in sorted(found - expected)),
        *(f"Tensor `{n}` is in the report and not in the checkpoint." for n in sorted(expected - found)),
    ]


def _file_problems(folder: Path, report: RestoreReport) -> list[str]:
    problems: list[str] = []
    for row in report.files:
        path = folder / row.name
        if not path.is_file():
            problems.append(f"File {row.name} is in the report and not in the folder.")
        elif path.stat().st_size != row.bytes:
            problems.append(f"File {row.name} has {path.stat().st_size} bytes; the report says {row.bytes}.")
        elif (found := _sha256(path)) != row.sha256:
            problems.append(f"File {row.name} has sha256 {found}; the report says {row.sha256}.")
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
