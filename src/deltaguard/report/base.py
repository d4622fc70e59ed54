"""What every report has in common."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict, model_validator

from deltaguard.text import writable

LIBRARIES = ("deltaguard", "torch", "transformers", "peft", "safetensors", "huggingface_hub")


_NUMBERS = (float, int, bool, type(None))


class Record(BaseModel):
    """A frozen part of a report; unknown fields, infinite numbers and those that are none are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null")

    @model_validator(mode="after")
    def _writable(self) -> Self:
        """Write out what names of files may hold and a file of text cannot."""
        for name, value in self.__dict__.items():
            if type(value) not in _NUMBERS and (written := _written(value)) is not value:
                self.__dict__[name] = written
        return self


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
    """A model that took part: where it came from and what identifies it.

    Attributes:
        reference: what the user called it.
        fingerprint: of its weights.
        config_sha256: of its configuration; null, like the others, in reports of before it was known.
        tokenizer_sha256: of its tokenizer.
        template_sha256: of its chat template.
    """

    reference: str
    fingerprint: str
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    template_sha256: str | None = None


class RateRow(Record):
    """A measured rate with its 95 % Wilson interval."""

    successes: int
    total: int
    value: float
    low: float
    high: float


def _written(value: Any) -> Any:
    """A value with all its texts writable; the value itself where they are."""
    if isinstance(value, str):
        return value if value.isascii() else writable(value)
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, Mapping):
        parts = cast("Mapping[Any, Any]", value)
        return {_written(key): _written(each) for key, each in parts.items()}
    if isinstance(value, tuple | list) and value and type(value[0]) not in _NUMBERS:
        parts = map(_written, cast("tuple[Any, ...] | list[Any]", value))
        return tuple(parts) if isinstance(value, tuple) else list(parts)
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
