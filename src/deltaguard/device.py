"""Where models run."""

import torch

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
        # Some devices take data and hold none.
        torch.zeros(1, device=device).item()
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
