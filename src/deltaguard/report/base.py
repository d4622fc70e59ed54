"""What every report has in common."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel, ConfigDict

LIBRARIES = ("deltaguard", "torch", "transformers", "peft", "safetensors", "huggingface_hub")


class Record(BaseModel):
    """A frozen part of a report; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


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
