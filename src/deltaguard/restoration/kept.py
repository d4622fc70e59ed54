"""Prepared layers kept from one price to the next: in memory, else in a scratch file, else not at all."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass
class Kept:
    """Keeps dataclasses of tensors by name, as long as this object lives.

    What fits a budget stays in memory. What does not is written to a nameless file, from which it is read
    again when it is asked for and which is gone when the process is; that file leaves a reserve of the disk
    free. Where neither has room nothing is kept.

    Attributes:
        memory: bytes that may be held in the device's memory.
        folder: where the scratch file lies.
        reserve: bytes of the disk that must stay free.
        device: that the tensors are on, and that those which are read again are taken to.

    Example:
        ```python
        kept = Kept(memory=1 << 30, folder=Path("out"), reserve=0)
        kept.add("layer", prepared)
        prepared = kept.get("layer")
        ```
    """

    memory: int
    folder: Path
    reserve: int
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._starts: dict[str, int] = {}
        self._scratch: Any = None

    def peek(self, name: str) -> Any | None:
        """Give what was kept under a name, with tensors that have no content if they lie in the file."""
        return self._held.get(name)

    def get(self, name: str) -> Any | None:
        """Give what was kept under a name, None where nothing was."""
        value = self._held.get(name)
        if name not in self._starts:
            return value
        self._scratch.seek(self._starts[name])
        return map_tensors(value, self._read)

    def add(self, name: str, value: Any) -> None:
        """Keep a dataclass, whose tensors may lie in nested dataclasses, if there is room for it."""
        size = sum(tensor.nbytes for tensor in _tensors(value))
        if size <= self.memory:
            self.memory -= size
            self._held[name] = value
            return
        if shutil.disk_usage(self.folder).free - size <= self.reserve:
            return
        if self._scratch is None:
            try:
                # Without a buffer: layers are larger than any.
                self._scratch = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115
            except OSError:
                return
            weakref.finalize(self, self._scratch.close)
        start = self._scratch.seek(0, 2)
        # Another program, or another process of this run, may take the room meanwhile: the layer is made
        # again when it is needed, and what was written of it takes none of the output's.
        try:
            placeholders = map_tensors(value, self._write)
        except OSError:
            self._scratch.truncate(start)
            return
        if shutil.disk_usage(self.folder).free <= self.reserve:
            self._scratch.truncate(start)
            return
        self._held[name], self._starts[name] = placeholders, start

    def _write(self, tensor: Tensor) -> Tensor:
        """Append a tensor to the scratch file, and give its shape and dtype without content."""
        left = _bytes(tensor.detach().cpu().contiguous())
        while left:
            left = left[self._scratch.write(left) :]
        return torch.empty_like(tensor, device="meta")

    def _read(self, placeholder: Tensor) -> Tensor:
        """Read the tensor that comes next in the scratch file."""
        found = torch.empty(placeholder.shape, dtype=placeholder.dtype)
        left = _bytes(found)
        while left:
            left = left[self._scratch.readinto(left) :]
        return found.to(self.device)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in cast("tuple[Any, ...]", value):
            yield from _tensors(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def map_tensors(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """Copy a dataclass, nested ones too, with every tensor changed, in the order of its fields."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return cast("_T", tuple(map_tensors(each, change) for each in cast("tuple[Any, ...]", value)))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), change) for f in fields(value) if f.init}
        return replace(value, **changed)
    return value
