"""Whether an adapter that `restore` wrote fits its base model: shapes, ranks, names and pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaguard.errors import DeltaguardError
from deltaguard.models.adapter import open_adapter_weights
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.hub import is_local
from deltaguard.models.lora import STORED, Target, find_changes
from deltaguard.models.lora_config import LoraConfig, read_lora_config
from deltaguard.models.shards import TensorInfo
from deltaguard.reports.records.base import ModelReference
from deltaguard.reports.records.restore import RestoreReport


@dataclass(frozen=True)
class AdapterCheck:
    """What the headers of an adapter say of it.

    Attributes:
        tensors: its tensors whose values may be looked at.
        problems: one sentence each.
        unchecked: what could not be looked at, and why; one sentence each.
    """

    tensors: Mapping[str, TensorInfo]
    problems: tuple[str, ...]
    unchecked: tuple[str, ...]


def check_adapter(folder: Path, report: RestoreReport) -> AdapterCheck:
    """Compare an adapter with the layers of its report, and with its base model where that can be opened.

    Args:
        folder: of the adapter.
        report: of the restore that wrote it.

    Raises:
        DeltaguardError: the adapter cannot be opened.
    """
    lora = read_lora_config(folder, str(folder))
    _, tensors = open_adapter_weights(folder)
    base, unchecked = _open_base(report.aligned)
    problems: list[str] = []
    targets = [_restored(report, lora, base)]
    if base is not None:
        targets.append(Target(base.reference, base.config, base.tensors))
    for target in targets:
        problems += find_changes(lora, tensors, target, str(folder))[1]
    readable = {name: info for name, info in tensors.items() if info.dtype in STORED}
    return AdapterCheck(readable, tuple(problems), unchecked)


def _open_base(aligned: ModelReference) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Find the model that was aligned, if it still lies where it lay, or why it was not looked at."""
    base = None
    if not is_local(aligned.reference):
        why = "it is no local folder"
    else:
        try:
            base = Checkpoint.open(aligned.reference)
            why = f"it has fingerprint {base.fingerprint()} now, the report says {aligned.fingerprint}"
        except DeltaguardError as error:
            why = str(error)
    if base is not None and base.fingerprint() == aligned.fingerprint:
        return base, ()
    return None, (f"The adapter was not compared with {aligned.reference} itself: {why}.",)


def _restored(report: RestoreReport, lora: LoraConfig, base: Checkpoint | None) -> Target:
    # A report does not say what kind of model it is about; what the adapter says of its weights must do.
    turned = base is None and lora.fan_in_fan_out
    tensors = {
        row.name: TensorInfo(row.name, STORED[0], row.shape[::-1] if turned else row.shape, "", 0, 0)
        for row in report.layers
    }
    return Target("the report", {} if base is None else base.config, tensors)
