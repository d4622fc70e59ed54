"""What processes of their own do for a job: the file that tells them, and the one with what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import override

from deltaguard import __version__
from deltaguard.restoration.options import RestoreConfig
from deltaguard.service.schemas import JobError
from deltaguard.service.settings import Gate, Limits, Moderation, key_names, restore_options

FINETUNED, RESTORED, CHECKPOINTS, METRICS = "finetuned", "restored", "checkpoints", "metrics.csv"
EXAMINED, FILES = "examined", "files"
"""What lies in a job's folder."""

MethodName = Literal["supervised", "dpo"]
Kind = Literal["moderate", "calibrate", "train", "restore", "examine"]


class _Task(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    half_done: ClassVar[tuple[str, ...]] = ()
    """Names, in the job's folder, of what an interrupted process leaves for the same task alone."""

    model: str
    device: str
    release: str = __version__

    @property
    def key_names(self) -> tuple[str, ...]:
        """Name the environment variables that its process is given beside the usual ones."""
        return ()


class Calibrate(_Task):
    """Measure the curvature of an aligned model, unless a store of it is kept.

    Attributes:
        model: the aligned model.
        device: where models run.
        options: of `CalibrateConfig`.
        restore: of `RestoreConfig`, which say what a store must keep.
    """

    kind: Literal["calibrate"] = "calibrate"
    options: Mapping[str, Any]
    restore: Mapping[str, Any]


class Train(_Task):
    """Fine-tune an aligned model.

    Attributes:
        model: the aligned model.
        device: where models run.
        method: `supervised` or `dpo`.
        training_file: its place.
        validation_file: likewise.
        limits: of both.
        epochs, batch_size, learning_rate, max_length, seed: as in `FinetuneConfig`.
        lora_rank: of the adapter; None trains all weights.
        lora_alpha: of the adapter.
        beta: of DPO.
    """

    kind: Literal["train"] = "train"
    method: MethodName
    training_file: Path
    validation_file: Path | None
    limits: Limits
    epochs: int
    batch_size: int
    learning_rate: float
    max_length: int
    seed: int
    lora_rank: int | None
    lora_alpha: int
    beta: float


class Moderate(_Task):
    """Have a judge look at training rows.

    Attributes:
        model: the aligned model.
        device: where models run.
        method: `supervised` or `dpo`.
        training_file: its place.
        limits: of it.
        moderation: who looks, and what becomes of what they find.
    """

    kind: Literal["moderate"] = "moderate"
    method: MethodName
    training_file: Path
    limits: Limits
    moderation: Moderation

    @property
    @override
    def key_names(self) -> tuple[str, ...]:
        """Name the environment variable of the judge's key, where it needs one."""
        return key_names(self.moderation.chosen_judge)


class Restore(_Task):
    """Restore what was trained.

    Attributes:
        model: the aligned model.
        device: where models run.
        options: as the operator gave them, see `restore_options`.
    """

    half_done = (RESTORED,)

    kind: Literal["restore"] = "restore"
    options: Mapping[str, Any]

    @property
    @override
    def key_names(self) -> tuple[str, ...]:
        """Name the environment variable of the judge's key, where it needs one."""
        options = restore_options(self.options, lora_rank=None)
        return key_names(RestoreConfig.model_validate(options).judge)


class Examine(_Task):
    """Ask the aligned, the fine-tuned and the restored model, and compare them.

    Attributes:
        model: the aligned model.
        device: where models run.
        gate: what is asked, and what must be passed.
        method: `supervised` or `dpo`.
        training_file: the customer's; what is asked in it is not asked by the gate.
        validation_file: the customer's, measured as well.
        limits: of both.
        max_length: tokens of a row, as in training.
    """

    half_done = (EXAMINED,)

    kind: Literal["examine"] = "examine"
    gate: Gate
    method: MethodName = "supervised"
    training_file: Path | None = None
    validation_file: Path | None = None
    limits: Limits = Limits()
    max_length: int = 1024

    @property
    @override
    def key_names(self) -> tuple[str, ...]:
        """Name the environment variable of the judge's key, where it needs one."""
        return key_names(self.gate.chosen_judge)


AnyTask = Annotated[Moderate | Calibrate | Train | Restore | Examine, Field(discriminator="kind")]
ANY_TASK: TypeAdapter[AnyTask] = TypeAdapter(AnyTask)


class Told(BaseModel):
    """A line of what a task tells while it works; the arguments of `events.tell`."""

    once: str
    message: str
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics", "moderation_checks"] = "message"
    data: dict[str, Any] | None = None


OPERATORS_BUSINESS = "The service could not go on with this job; its operator finds out why in the log."
"""Said of what a customer can do nothing about."""


class Outcome(BaseModel):
    """What came of a task.

    Attributes:
        error: why the job fails; None where it goes on.
        reason: what the operator's log says of that, where it is not the customer's business.
        is_away: whether the step failed because a server that it asks is away.
        data: what later steps need to know.
    """

    error: JobError | None = None
    reason: str | None = None
    is_away: bool = False
    data: dict[str, Any] = {}


def events_file(kind: str) -> str:
    """Name the file in a job's folder that holds what a step told."""
    return f"{kind}.events.jsonl"


BLOCKED = "safety_gate_"
"""How the codes of errors begin where the gate blocked a model; the failed check follows."""
