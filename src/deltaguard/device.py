"""Where models run, and in which arithmetic they are asked."""

import platform
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from deltaguard.errors import DeltaguardError, is_lack_of_memory
from deltaguard.memory import usable_memory_bytes
from deltaguard.models.loading import foreign


def find_device(name: str = "auto") -> torch.device:
    """Find the device of a name, and try it out.

    Args:
        name: `auto` is CUDA where there is one, else the CPU.

    Raises:
        DeltaguardError: it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with foreign(f"The device {name!r} cannot be used (try `cpu`, or `auto`)"):
        device = torch.device(name)
        # Some devices take data and hold none, and some know no float64, in which prices are summed.
        torch.zeros(1, dtype=torch.float64, device=device).item()
    return device


def numbered(device: torch.device) -> torch.device:
    """Give a GPU its number: each thread has a current one of its own, at first that of number 0.

    Example:
        >>> numbered(torch.device("cpu"))
        device(type='cpu')
    """
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_name(name: str = "auto") -> str:
    """Name a device as reports do, a GPU by its model.

    Args:
        name: as in `find_device`.

    Raises:
        DeltaguardError: as `find_device`.

    Example:
        ```python
        device_name()  # "cpu", or "cuda (NVIDIA H100 80GB HBM3)"
        ```
    """
    device = find_device(name)
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def served_dtype(device: torch.device) -> torch.dtype:
    """Find in which dtype a device answers fastest: bfloat16 where it multiplies in it, else float32.

    Example:
        >>> served_dtype(torch.device("meta"))
        torch.float32
    """
    if device.type == "cuda":
        # It is asked of the current device, which need not be this one.
        with torch.cuda.device(device):
            has_products = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Without instructions for it, products in bfloat16 are many times slower.
        has_products = device.type == "cpu" and _multiplies_bfloat16()
    return torch.bfloat16 if has_products else torch.float32


def _multiplies_bfloat16() -> bool:
    """Ask the processor, of which torch 2.9 tells in private functions alone."""
    if platform.machine() in ("x86_64", "AMD64"):
        # oneDNN says yes on every processor with AVX-512, and emulates the products where it has no more.
        told = vars(torch.cpu)
        return told["_is_avx512_bf16_supported"]() or told["_is_amx_tile_supported"]()
    # Where torch is built without oneDNN, as on macOS, there is nothing to ask.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001


def memory_bytes(device: torch.device) -> int:
    """Say how much memory a device has for the process, whatever of it is in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return usable_memory_bytes()


@contextmanager
def exact_products() -> Generator[None]:
    """Multiply matrices in float32 for a while, whatever the process allows: not in TF32 or bfloat16.

    Those keep 10 and 7 bits of 23: deltas are small against weights, and safety KL against logits. It holds
    for the whole process; what it allowed before comes back after.

    Example:
        >>> with exact_products():
        ...     torch.backends.cuda.matmul.fp32_precision
        'ieee'
    """
    # Of what torch adds to its modules as it is imported, their types say nothing.
    backends: Any = torch.backends
    products = backends.cuda.matmul, backends.mkldnn.matmul
    before = [each.fp32_precision for each in products]
    try:
        for each in products:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(products, before, strict=True):
            each.fp32_precision = precision


@contextmanager
def enough_memory(advice: str) -> Generator[None]:
    """Turn a lack of memory into one message.

    Args:
        advice: what to do, to follow a colon.

    Raises:
        DeltaguardError: in the place of the error that tells of it, with what that says.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise DeltaguardError(f"Too little memory: {advice}. {error}") from error


def stays_precise(model: Any, name: str) -> bool:
    """Tell whether a model computes with a parameter in float32 whatever its dtype, such as a router's.

    Args:
        model: a transformers model.
        name: of the parameter.
    """
    patterns = model._keep_in_fp32_modules_strict or ()  # noqa: SLF001  # searched for as transformers does
    return any(re.search(each.replace("*", ".*"), name) for each in patterns)


@contextmanager
def as_served(model: Any) -> Generator[None]:
    """Let a float32 model run in its device's `served_dtype` for a while; its own weights come back after.

    Args:
        model: a transformers model; of another dtype it is left as it is.
    """
    dtype = served_dtype(model.device)
    if model.dtype != torch.float32 or dtype == torch.float32:
        yield
        return
    kept = [
        (each, each.data)
        for name, each in model.named_parameters()
        if each.is_floating_point() and not stays_precise(model, name)
    ]
    try:
        for parameter, weights in kept:
            parameter.data = weights.to(dtype)
        yield
    finally:
        for parameter, weights in kept:
            parameter.data = weights
