"""What every report has in common."""

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from deltaguard.text import writable

LIBRARIES = ("deltaguard", "torch", "transformers", "peft", "safetensors", "huggingface_hub")


_LARGEST = 1e100
"""Nothing that is measured comes near; beyond it, sums and squares would end in infinity."""


class Record(BaseModel):
    """A frozen part of a report, without unknown fields and without numbers that nothing measured can have.

    What names of files may hold and a file of text cannot is written out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null")

    @model_validator(mode="after")
    def _usable(self) -> Self:
        for name, value in self.__dict__.items():
            if (found := _usable(value)) is not value:
                object.__setattr__(self, name, found)
        return self


def _moment(text: str) -> str:
    try:
        datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError("it is no time in the form of ISO 8601") from error
    return text


Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0)]
Moment = Annotated[str, AfterValidator(_moment)]


class Environment(Record):
    """What the numbers were made with.

    Attributes:
        created: time of the run, UTC, ISO 8601.
        versions: release of each library that matters, and of Python.
        machine: operating system, processor architecture and number of threads.
        device: what the arithmetic ran on.
    """

    created: Moment
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

    successes: Count
    total: Count
    value: float
    low: float
    high: float


def _usable(value: Any) -> Any:
    """Give a value with all its texts writable; the value itself where they are."""
    if value is None or isinstance(value, BaseModel):
        return value
    if isinstance(value, str):
        return value if value.isascii() else writable(value)
    if isinstance(value, float | int):
        if not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"there is a number beyond {_LARGEST:g}")
        return value
    if isinstance(value, tuple | list):
        parts = [_usable(each) for each in cast("Sequence[Any]", value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        mapped = cast("Mapping[Any, Any]", value)
        return {_usable(key): _usable(each) for key, each in mapped.items()}
    return value


def require_known(what: str, named: Iterable[str], known: Collection[str]) -> None:
    """Refuse a report that speaks of what it does not have.

    Args:
        what: parts of the report, such as "measures".
        named: what they name.
        known: what there is.

    Raises:
        ValueError: something else is named.

    Example:
        >>> require_known("measures", ["attack"], ["attack", "harmless"])
    """
    unknown = sorted({name for name in named if name not in known})
    if unknown:
        raise ValueError(f"{what} name {', '.join(map(repr, unknown[:3]))}, which the report does not have")


def environment(device: str, *, libraries: Sequence[str] = ()) -> Environment:
    """Record the versions and the machine of this process, at this moment.

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
