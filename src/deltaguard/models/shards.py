"""One safetensors file: its header, and tensors read from it one at a time without mapping it into memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaguard.models.opened import OpenFile
from deltaguard.text import writable

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtype codes of safetensors that torch can hold."""

_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor of a checkpoint lies, from the header of its shard alone.

    Attributes:
        name: the tensor's name, such as `model.layers.0.mlp.down_proj.weight`.
        dtype: its safetensors code, such as `BF16`.
        shape: its shape; empty for a single number.
        shard: the file's name within the checkpoint's folder.
        start: first byte of the data, counted from the beginning of the file.
        end: the byte after the last one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


def shard_problem(path: Path) -> str | None:
    """Say what is wrong with a safetensors file as a whole, from its header alone; None where nothing is.

    Args:
        path: the file.

    Returns:
        One sentence with the file's name and its sizes if it is truncated, corrupt or unreadable.
    """
    if str(path) != writable(str(path)):
        return (
            f"{path.name} lies at {path}, which is not UTF-8: safetensors opens no such path, so rename it."
        )
    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return _damage(path, str(error))


def _damage(path: Path, reason: str) -> str:
    """Say what is wrong with a file that safetensors does not open."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(len(_LFS_POINTER))
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}."
    if beginning == _LFS_POINTER:
        return f"{path.name} is a Git LFS pointer of {size} bytes, not the weights: run `git lfs pull`."
    expected = _LENGTH_BYTES + int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    if expected > size:
        is_header = beginning[_LENGTH_BYTES:].startswith(b"{")
        expected = expected if is_header else None
    else:
        try:
            tensors = parse_header(read_header(OpenFile(path)), path.name)
            expected = max((tensor.end for tensor in tensors), default=expected)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            expected = None
    if expected is None:
        return f"{path.name} ({size:,} bytes) is not a safetensors file: {reason}."
    if size < expected:
        return f"{path.name} is truncated: {size:,} bytes of the {expected:,} that its header describes."
    return f"{path.name} is corrupt: {size:,} bytes, its header describes {expected:,} ({reason})."


def read_header(file: OpenFile) -> bytes:
    """Read the header of a valid safetensors file, its 8-byte length included."""
    length = bytearray(_LENGTH_BYTES)
    file.read_into(0, memoryview(length))
    header = bytearray(_LENGTH_BYTES + int.from_bytes(length, "little"))
    file.read_into(0, memoryview(header))
    return bytes(header)


def parse_header(header: bytes, shard: str) -> list[TensorInfo]:
    """List the tensors that a valid header describes, in the order of their data.

    Args:
        header: as `read_header` returns it.
        shard: name of the file, for `TensorInfo.shard`.
    """
    entries: dict[str, dict[str, Any]] = json.loads(header[_LENGTH_BYTES:])
    entries.pop("__metadata__", None)
    tensors = [
        TensorInfo(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            shard=shard,
            start=len(header) + entry["data_offsets"][0],
            end=len(header) + entry["data_offsets"][1],
        )
        for name, entry in entries.items()
    ]
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))


def read_tensor(file: OpenFile, info: TensorInfo) -> Tensor:
    """Read one tensor, in its stored dtype, into memory of its own.

    Args:
        file: the shard that holds it.
        info: the tensor.

    Raises:
        DeltaguardError: the file cannot be read, or has become shorter.
    """
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    file.read_into(info.start, data.numpy().data)
    return data.view(DTYPES[info.dtype]).reshape(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """View the bytes of a tensor as safetensors stores them, without a copy where possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
