"""What every report has in common."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, model_validator

from deltaguard.text import writable

LIBRARIES = ("deltaguard", "torch", "transformers", "peft", "safetensors", "huggingface_hub")


class Record(BaseModel):
    """A frozen part of a report; unknown fields, infinite numbers and those that are none are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null")

    @model_validator(mode="before")
    @classmethod
    def _writable(cls, data: Any) -> Any:
        """Names of files may hold what a report cannot."""
        return _writable(data)


class Environment(Record):
    """What the numbers were made with.

    Attributes:
        created: time of the run, UTC, ISO 8601.
        versions: release of each library that matters, and of Python.
        machine: operating system, processor architecture and number of threads.
        device: what the arithmetic ran on.
    """

    created: str
    versions: Mapping[str, str]
    machine: str
    device: str


class ModelReference(Record):
    """A model that took part: where it came from and the fingerprint of its weights."""

    reference: str
    fingerprint: str


class RateRow(Record):
    """A measured rate with its 95 % Wilson interval."""

    successes: int
    total: int
    value: float
    low: float
    high: float


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else writable(value)
    if isinstance(value, Mapping):
        return {_writable(key): _writable(each) for key, each in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_writable(each) for each in cast("Sequence[Any]", value)]
    return value


def environment(device: str, *, libraries: Sequence[str] = ()) -> Environment:
    """The versions and the machine of this process, at this moment.

    Args:
        device: what the arithmetic runs on, such as "cpu" or "cuda (NVIDIA H100)".
        libraries: distributions to name beside `LIBRARIES` where they are installed.

    Example:
        >>> environment("cpu").device
        'cpu'
    """
    import torch

    return Environment(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) or "not installed" for name in LIBRARIES},
            **{name: found for name in libraries if (found := _version(name)) is not None},
        },
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        device=device,
    )


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
