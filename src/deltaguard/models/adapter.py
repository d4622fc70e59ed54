"""A PEFT LoRA adapter seen as a checkpoint: aligned + scale · B A, one matrix at a time."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import Checkpoint, content_fingerprint
from deltaguard.models.companions import adapter_companions
from deltaguard.models.hub import locate
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.models.loading import refuse_code
from deltaguard.models.lora import Change, find_changes
from deltaguard.models.lora_config import MERGE, read_lora_config
from deltaguard.models.opened import OpenFile, Snapshot
from deltaguard.models.shards import (
    DTYPES,
    TensorInfo,
    parse_header,
    read_header,
    read_tensor,
    shard_problem,
)

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class ThinDelta:
    """What an adapter adds to a layer, in the orientation (out, in): up @ down.

    Attributes:
        up: scale · B, (out, rank).
        down: A, (rank, in).
    """

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A LoRA adapter over an aligned checkpoint. Make one with `AdapterCheckpoint.open`.

    It has exactly the tensors, shards and headers of the aligned checkpoint. What the adapter does not touch
    is read from there.

    Attributes:
        aligned: the checkpoint that the adapter belongs to.
        reference: what the user called the adapter.
        folder: where the adapter's files lie; index and configuration are in the aligned folder.
    """

    aligned: Checkpoint
    reference: str
    folder: Path
    _changes: Mapping[str, Change] = field(repr=False)
    _file: OpenFile = field(repr=False, compare=False)
    _others: Snapshot = field(repr=False, compare=False)

    @classmethod
    def open(cls, aligned: Checkpoint, reference: str | Path) -> "AdapterCheckpoint":
        """Open an adapter and check, from configuration and headers, that it can be expanded and fits.

        The model that the adapter names as its own is not compared: it may have been moved.

        Args:
            aligned: the checkpoint that the adapter was trained on.
            reference: a PEFT folder, a Hub id, or `id@revision`.

        Raises:
            DeltaguardError: it is no LoRA adapter; it uses a variant that is not aligned + scale · B A, such
                as DoRA; or it belongs to another model. All modules that do not fit are listed.
        """
        folder = locate(reference)
        refuse_code(folder, str(reference))
        own = [folder / path for path in adapter_companions(folder)]
        others = Snapshot.of([folder / ADAPTER_CONFIG, *own])
        lora = read_lora_config(folder, str(reference))
        file, tensors = open_adapter_weights(folder)
        changes, problems = find_changes(lora, tensors, aligned, str(reference))
        if problems:
            problems.append(
                f"If it was trained on another model ({lora.base_model_name_or_path}?), give that. {MERGE}"
            )
            raise DeltaguardError(
                listed(f"The adapter {reference} does not fit {aligned.reference}", problems)
            )
        return cls(aligned, str(reference), folder, changes, file, others)

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of the aligned model's `config.json`."""
        return self.aligned.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The aligned checkpoint's tensors, ordered by shard and then by position in the shard."""
        return self.aligned.tensors

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the aligned checkpoint's weight files, sorted."""
        return self.aligned.shards

    @property
    def index_name(self) -> str | None:
        """Name of the aligned checkpoint's index file, None for a single file."""
        return self.aligned.index_name

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes or replaces; all others are the aligned ones."""
        return frozenset(self._changes)

    def read(self, name: str) -> Tensor:
        """One tensor of the fine-tuned model, in memory of its own.

        Args:
            name: a key of `tensors`.

        Returns:
            Where the adapter has low-rank matrices for it, aligned + scale · B A in float32 (float64 over a
            float64 weight), not rounded to the stored dtype; where it holds the whole tensor
            (`modules_to_save`), that one; otherwise the aligned tensor, in its stored dtype.

        Raises:
            KeyError: there is no such tensor.
            DeltaguardError: a file is gone, cannot be read, or has become shorter.
        """
        change = self._changes.get(name)
        if change is None:
            return self.aligned.read(name)
        whole = change.replaced
        weight = self.aligned.read(name) if whole is None else read_tensor(self._file, whole)
        if change.a is None or change.b is None:
            return weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        a = read_tensor(self._file, change.a).to(weight.dtype)
        b = read_tensor(self._file, change.b).to(weight.dtype)
        left, right = (a.T, b.T) if change.transposed else (b, a)
        return weight.addmm_(left, right, alpha=change.scale)

    def thin_delta(self, name: str) -> ThinDelta | None:
        """The difference from the aligned tensor as a product, None where the adapter has none for it.

        Args:
            name: a key of `tensors`.

        Returns:
            In float32, or float64 over a float64 weight.

        Raises:
            KeyError: there is no such tensor.
            DeltaguardError: as `read`.
        """
        stored = DTYPES[self.tensors[name].dtype]
        change = self._changes.get(name)
        if change is None or change.a is None or change.b is None or change.replaced is not None:
            return None
        dtype = torch.promote_types(stored, torch.float32)
        up, down = (read_tensor(self._file, part).to(dtype) for part in (change.b, change.a))
        return ThinDelta(up * change.scale, down)

    def header(self, shard: str) -> bytes:
        """The header of one weight file of the aligned checkpoint, its 8-byte length included."""
        return self.aligned.header(shard)

    def fingerprint(self) -> str:
        """A content fingerprint of the aligned checkpoint, the adapter's tensors and their scales.

        It differs from that of the merged checkpoint. What it cannot see is said at `Checkpoint.fingerprint`.
        """
        parts = [part for change in self._changes.values() for part in change.parts]
        adapter = content_fingerprint({ADAPTER_FILE: self._file}, {part.name: part for part in parts})
        scales = {name: change.scale for name, change in self._changes.items()}
        described = json.dumps([self.aligned.fingerprint(), adapter, scales], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def changes(self) -> list[str]:
        """Say what happened to its files, and to the aligned checkpoint's, since they were opened."""
        own = self._file.change()
        return [*([own] if own else []), *self._others.changes(), *self.aligned.changes()]


def is_adapter(reference: str | Path) -> bool:
    """Whether a folder or Hub repository holds a PEFT adapter rather than a model.

    Args:
        reference: a local folder, a Hub id, or `id@revision`.

    Raises:
        DeltaguardError: there is no such folder or repository, or it holds both.
    """
    if not (locate(reference, weights=False) / ADAPTER_CONFIG).exists():
        return False
    models = [path.name for path in locate(reference).glob("*.safetensors") if path.name != ADAPTER_FILE]
    if models:
        raise DeltaguardError(
            f"{reference} holds both an adapter ({ADAPTER_CONFIG}) and a model ({min(models)}), so it is "
            "unclear which is meant: move one of them to another folder."
        )
    return True


def open_adapter_weights(folder: Path) -> tuple[OpenFile, dict[str, TensorInfo]]:
    """Open the file of an adapter's weights, and read its header.

    Args:
        folder: the adapter's folder.

    Raises:
        DeltaguardError: there are no weights in a safetensors file, or the file is damaged.
    """
    path = folder / ADAPTER_FILE
    pickled = folder / "adapter_model.bin"
    if not path.exists() and pickled.exists():
        raise DeltaguardError(
            f"The adapter's weights are pickled ({pickled}), and loading a pickle runs what it holds. "
            'If you trust them, convert them: python -c "import torch, safetensors.torch as s; '
            f's.save_file(torch.load({str(pickled)!r}, weights_only=True), {str(path)!r})"'
        )
    problem = shard_problem(path) if path.exists() else f"there is no {ADAPTER_FILE} in it."
    if problem:
        raise DeltaguardError(f"The adapter {folder} cannot be used: {problem}")
    file = OpenFile(path)
    return file, {info.name: info for info in parse_header(read_header(file), ADAPTER_FILE)}
