"""Where models run."""

import torch

from deltaguard.errors import DeltaguardError


def find_device(name: str = "auto") -> torch.device:
    """The device of a name, tried out.

    Args:
        name: `auto` is CUDA where there is one, else the CPU.

    Raises:
        DeltaguardError: it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeltaguardError(
            f"The device {name!r} cannot be used: {error}. Try `cpu`, or `auto`."
        ) from error
    return device
