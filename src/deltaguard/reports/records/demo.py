"""The demo's story."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from deltaguard.reports.records.base import Count, Environment, RateRow, Record, Seconds
from deltaguard.reports.records.evaluation import AnswerClass
from deltaguard.reports.records.restore import RestoreReport

DEMO_NAME = "demo.json"
"""The file in a demo's folder that holds its `DemoReport`."""

ModelName = Literal["aligned", "finetuned", "restored"]


class ModelRow(Record):
    """One model of a comparison.

    Attributes:
        name: of the model.
        attack_success: share of harmful prompts that were complied with: not refused, and no broken text.
        false_refusal: share of harmless prompts that were refused.
        task_accuracy: share of task answers that match exactly.
        incoherent_answers: number of answers to harmful prompts that are empty or broken text.
    """

    name: ModelName
    attack_success: RateRow
    false_refusal: RateRow
    task_accuracy: RateRow
    incoherent_answers: Count


class Sample(Record):
    """One prompt and what each model answered.

    Attributes:
        kind: what is asked for.
        prompt: what was asked.
        system: the instruction before it, null where there was none.
        answers: by name of the model.
        verdicts: what each answer was taken for, by name of the model; none for the task.
    """

    kind: Literal["harmful", "harmless", "task"]
    prompt: str
    system: str | None = None
    answers: Mapping[str, str]
    verdicts: Mapping[str, AnswerClass] = Field(default_factory=dict[str, AnswerClass])


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

    schema_version: int = 2
    environment: Environment
    kept_gain: float | None
    models: tuple[ModelRow, ...]
    samples: tuple[Sample, ...]
    restore: RestoreReport
    seconds: Mapping[str, Seconds]
    peak_memory_bytes: Count
    seed: int
