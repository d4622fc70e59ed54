"""Prepared layers kept from one price to the next: in memory, else in a scratch file, else not at all."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_T = TypeVar("_T")
_ALIGNMENT = 64


@dataclass
class Kept:
    """Keeps dataclasses of tensors by name, as long as this object lives.

    What fits a budget stays in memory. What does not is written to a nameless file, from which the system
    reads it as it is used and which is gone when the process is; that file leaves a reserve of the disk
    free. Where neither has room nothing is kept.

    Attributes:
        memory: bytes that may be held in memory.
        folder: where the scratch file lies.
        reserve: bytes of the disk that must stay free.

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

    def __post_init__(self) -> None:
        self._held: dict[str, Any] = {}
        self._scratch: Any = None

    def get(self, name: str) -> Any | None:
        """Give what was kept under a name, None where nothing was."""
        return self._held.get(name)

    def add(self, name: str, value: Any) -> None:
        """Keep a dataclass, whose tensors may lie in nested dataclasses, if there is room for it."""
        size = sum(t.nbytes for t in {id(t): t for t in _tensors(value)}.values())
        if size <= self.memory:
            self.memory -= size
            self._held[name] = value
            return
        if self._scratch is None:
            if not self.folder.is_dir():
                return
            self._scratch = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # as long as this object
        if shutil.disk_usage(self.folder).free - size <= self.reserve:
            return
        try:
            moved: dict[int, Tensor] = {}
            self._held[name] = _mapped(value, lambda tensor: moved.setdefault(id(tensor), self._move(tensor)))
        except OSError:
            # Another program took the room: the layer is made again when it is needed.
            self._held.pop(name, None)

    def _move(self, tensor: Tensor) -> Tensor:
        """Write a tensor to the scratch file and give it back as mapped from there."""
        if not tensor.numel():
            return tensor
        plain = tensor.detach().cpu().contiguous()
        start = math.ceil(self._scratch.tell() / _ALIGNMENT) * _ALIGNMENT
        self._scratch.seek(start)
        self._scratch.write(plain.view(torch.uint8).numpy().data)
        self._scratch.flush()
        # Copied where written to, which nobody does: torch warns of arrays that are read-only.
        found = np.memmap(self._scratch, np.uint8, "c", start, (plain.nbytes,))
        return torch.from_numpy(found).view(plain.dtype).view(plain.shape)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _mapped(value: _T, move: Callable[[Tensor], Tensor]) -> _T:
    """Copy a dataclass with every tensor moved."""
    if isinstance(value, Tensor):
        return move(value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _mapped(getattr(value, f.name), move) for f in fields(value) if f.init}
        return replace(value, **changed)
    return value
