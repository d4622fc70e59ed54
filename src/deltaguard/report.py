"""The schema of what deltaguard reports. JSON, terminal, HTML and model card are drawn from it alone."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

REPORT_NAME = "deltaguard_report.json"
"""The file in a restored checkpoint that holds its `RestoreReport`."""

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
    """A model that took part: where it came from and the fingerprint of its weights."""

    reference: str
    fingerprint: str


class LayerRow(Record):
    """One restored weight matrix.

    Attributes:
        name: the tensor's name in the fine-tuned checkpoint.
        shape: as stored.
        delta_norm: ‖Δ‖, Frobenius.
        kept_fraction: share of the delta's entries at the fine-tuned value; see `Solution`.
        safety_cost: tr(Δ'HΔ'ᵀ) / tr(ΔHΔᵀ), null where no curvature is known.
        utility_loss: ‖Δ' - Δ‖² / ‖Δ‖².
        seconds: time of the solver.
        detail: numbers that belong to one method.
    """

    name: str
    shape: tuple[int, ...]
    delta_norm: float
    kept_fraction: float
    safety_cost: float | None
    utility_loss: float
    seconds: float
    detail: Mapping[str, float] = Field(default_factory=dict[str, float])


class OtherRow(Record):
    """A tensor that no solver touched, the model it was taken from, and why."""

    name: str
    source: Literal["aligned", "finetuned", "both"]
    reason: str
    differs: bool


class FileRow(Record):
    """A weight file as written."""

    name: str
    bytes: int
    sha256: str


class RestoreReport(Record):
    """Everything that a restore did.

    Attributes:
        schema_version: rises when a field changes its meaning.
        environment: versions, machine and time.
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        store_conversations: sha256 of the safety conversations behind the curvature, null without a store.
        options: method, strength and the other choices, as run.
        layers: one row a restored matrix, in the order of the checkpoint.
        others: one row for every other tensor.
        files: the weight files with their hashes.
        kept_fraction: mean over the layers that differ, weighted by entries.
        utility_loss: Σ‖Δ' - Δ‖² / Σ‖Δ‖² over them.
        safety_cost: median over them, null without curvature.
        seconds: wall time: total of this run, solve of all layers (those of an interrupted run included).
        peak_memory_bytes: largest resident memory of the process.
    """

    schema_version: int = 1
    environment: Environment
    aligned: ModelReference
    finetuned: ModelReference
    store_conversations: str | None
    options: Mapping[str, str | float | bool | None]
    layers: tuple[LayerRow, ...]
    others: tuple[OtherRow, ...]
    files: tuple[FileRow, ...]
    kept_fraction: float
    utility_loss: float
    safety_cost: float | None
    seconds: Mapping[str, float]
    peak_memory_bytes: int


class RateRow(Record):
    """A measured rate with its 95 % Wilson interval."""

    successes: int
    total: int
    value: float
    low: float
    high: float


class ModelRow(Record):
    """One model of a comparison.

    Attributes:
        name: aligned, finetuned or restored.
        attack_success: share of harmful prompts that were not refused.
        false_refusal: share of harmless prompts that were refused.
        task_accuracy: share of task answers that match exactly.
        empty_answers: number of empty answers among those to harmful prompts.
    """

    name: str
    attack_success: RateRow
    false_refusal: RateRow
    task_accuracy: RateRow
    empty_answers: int


class Sample(Record):
    """One prompt and what each model answered."""

    kind: Literal["harmful", "harmless", "task"]
    prompt: str
    answers: Mapping[str, str]


class DemoReport(Record):
    """The demo's story: three models measured alike, and the restore between them.

    Attributes:
        kept_gain: (restored - aligned) / (finetuned - aligned) of the task accuracy.
        models: aligned, finetuned, restored, in this order.
        samples: answers side by side.
        restore: what the restore did.
        seconds: wall time by stage.
        peak_memory_bytes: largest resident memory of the process.
        seed: seed of the fine-tunes and of the task.
    """

    schema_version: int = 1
    environment: Environment
    kept_gain: float | None
    models: tuple[ModelRow, ...]
    samples: tuple[Sample, ...]
    restore: RestoreReport
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    seed: int


class PlanReport(Record):
    """What a restore would do, from headers alone.

    Attributes:
        restored: tensors that a solver decides.
        from_aligned: tensors taken whole from the aligned model.
        from_finetuned: tensors taken whole from the fine-tuned model.
        extended: tensors of both: shared vocabulary rows and those that only the fine-tuned model has.
        read_bytes: weights that will be read.
        write_bytes: weights that will be written.
        curvature_bytes: curvature that will be read.
        peak_bytes: estimate of the memory that tensors will take at once.
        note: what the plan could not know.
    """

    restored: int
    from_aligned: int
    from_finetuned: int
    extended: int
    read_bytes: int
    write_bytes: int
    curvature_bytes: int
    peak_bytes: int
    note: str | None = None


class Verification(Record):
    """The outcome of `verify`.

    Attributes:
        folder: what was checked.
        tensors: how many tensors were read.
        problems: one sentence each; empty where all is well.
    """

    folder: str
    tensors: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


class TensorDiff(Record):
    """One tensor that differs, or of which only one model knows.

    Attributes:
        name: its name, in the fine-tuned checkpoint where it is there.
        difference: what headers tell ("shape", "dtype", "only aligned", "only finetuned") or, with the
            weights read, "values".
        aligned: shape and dtype there, None where absent.
        finetuned: shape and dtype there, None where absent.
        relative_norm: ‖Δ‖ / ‖aligned‖ where the weights were read.
        not_finite: entries of the delta that are NaN or infinite, where the weights were read.
    """

    name: str
    difference: str
    aligned: str | None
    finetuned: str | None
    relative_norm: float | None = None
    not_finite: int = 0


class KindRow(Record):
    """Tensors of one kind, such as `model.layers.*.mlp.up_proj.weight`, over all blocks."""

    kind: str
    tensors: int
    differing: int
    relative_norm: float | None


class DiffReport(Record):
    """The outcome of `diff`.

    Attributes:
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        deep: whether weights were read.
        tensors: every tensor that differs.
        kinds: a summary by kind.
        compatible: whether the pair could be restored.
    """

    aligned: str
    finetuned: str
    deep: bool
    tensors: tuple[TensorDiff, ...]
    kinds: tuple[KindRow, ...]
    compatible: bool


def environment(device: str) -> Environment:
    """The versions and the machine of this process, at this moment.

    Args:
        device: what the arithmetic runs on, such as "cpu" or "cuda (NVIDIA H100)".

    Example:
        >>> environment("cpu").device
        'cpu'
    """
    import torch

    return Environment(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        device=device,
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
