"""What goes over the wire, in the shapes of OpenAI's API."""

import re
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

ItemT = TypeVar("ItemT")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_zero(text: str) -> str:
    if "\0" in text or _SURROGATE.search(text):
        raise ValueError("zero bytes and lone surrogates are no text")
    return text


Text = Annotated[str, AfterValidator(_without_zero)]
METADATA_KEY = r'^[^"\\\x00-\x1f]{1,64}$'
"""Other keys are no part of a path into JSON, by which jobs are looked up."""

Metadata = Annotated[
    dict[Annotated[Text, Field(pattern=METADATA_KEY)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
]
Auto = Literal["auto"]


class Given(BaseModel):
    """A request; a field that the service does not know is an error, never left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Hyperparameters(Given):
    """What a job may choose; `trained_weights` is this service's: `"full"` trains all but the embeddings."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"
    trained_weights: Literal["lora", "full"] = "lora"


class Supervised(Given):
    """Options of supervised fine-tuning."""

    hyperparameters: Hyperparameters = Hyperparameters()


class DpoHyperparameters(Hyperparameters):
    """Numbers of learning preferences; `beta` says how closely the model stays at the one it started from."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"


class Dpo(Given):
    """Options of direct preference optimisation."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Given):
    """How a model learns.

    Raises:
        ValueError: options of another method are given.
    """

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="after")
    def _check_options(self) -> "Method":
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise ValueError(f"the type is {self.type}, and the options are those of {other}")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Give the hyperparameters of the chosen method."""
        if self.type == "dpo":
            return (self.dpo or Dpo()).hyperparameters
        return (self.supervised or Supervised()).hyperparameters


class CreateJob(Given):
    """A job to be made."""

    model: Annotated[Text, Field(max_length=300)]
    training_file: Annotated[Text, Field(max_length=64)]
    validation_file: Annotated[Text, Field(max_length=64)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    suffix: Annotated[Text, Field(max_length=64)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, by whichever of the two ways they were given."""
        return self.method.hyperparameters if self.method else self.hyperparameters or Hyperparameters()


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class Deleted(BaseModel):
    """What is there no more."""

    id: str
    object: str
    deleted: bool = True


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobMethod(BaseModel):
    """How a job's model learns."""

    type: str
    supervised: dict[str, Any] | None = None
    dpo: dict[str, Any] | None = None


class JobObject(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: dict[str, Any]
    method: JobMethod
    seed: int
    trained_tokens: int | None
    error: JobError | None
    metadata: dict[str, str] | None
    integrations: list[Any] = []


class EventObject(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None


class CheckpointMetrics(BaseModel):
    """What was measured at the step of a checkpoint."""

    step: int
    full_valid_loss: float | None = None


class CheckpointObject(BaseModel):
    """A model that a job published."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics


class ModelObject(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class Page(BaseModel, Generic[ItemT]):
    """A part of a list; `after` with the last id gives the next part."""

    object: Literal["list"] = "list"
    data: list[ItemT]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
