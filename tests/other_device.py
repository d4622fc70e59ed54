"""A second device, played on the CPU: its tensors do not mix with others, as those of a GPU do not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
_BETWEEN_DEVICES = {"to", "cpu", "copy_", "__setitem__", "__get__"}
_FACTORIES = ("empty", "zeros", "ones", "full", "eye", "arange", "linspace")


class Remote(torch.Tensor):
    """A tensor on the second device; what is computed from it is there, too."""

    device = DEVICE

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to compute from tensors of both devices; single numbers go along, as with a GPU."""
        with torch._C.DisableTorchFunctionSubclass():
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            places = {isinstance(each, cls) for each in given if each.ndim}
        if func.__name__ not in _BETWEEN_DEVICES and len(places) > 1:
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


def play(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors be made on the second device, taken to it, and back."""
    to, cpu = torch.Tensor.to, torch.Tensor.cpu

    def taken(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and args[0] == DEVICE:
            return to(self, copy=True, dtype=self.dtype).as_subclass(Remote)
        found = to(self, *args, **options)
        return found.as_subclass(torch.Tensor) if args and args[0] == torch.device("cpu") else found

    monkeypatch.setattr(torch.Tensor, "to", taken)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: cpu(self).as_subclass(torch.Tensor))
    for name in _FACTORIES:
        original = getattr(torch, name)

        def made(*args: Any, original: Any = original, **options: Any) -> torch.Tensor:
            if options.get("device") != DEVICE:
                return original(*args, **options)
            return original(*args, **{**options, "device": "cpu"}).as_subclass(Remote)

        monkeypatch.setattr(torch, name, made)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a dataclass, and in what it holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_of(getattr(value, name))
