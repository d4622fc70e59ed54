"""What a check of a fine-tuned model found."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from deltaguard.reports.records.base import Environment, ModelReference, Record, Seconds
from deltaguard.reports.records.dial import Look, Probe

Verdict = Literal["safe", "restore", "not told apart"]


class CheckReport(Record):
    """Whether a fine-tuned model is as safe as the aligned one, by its answers and by safety KL.

    Attributes:
        environment: versions, machine and time.
        aligned: the aligned model.
        finetuned: the fine-tuned one.
        look: how it answers held-out requests, beside the aligned model.
        systems: system prompts of a deployment, under which, and under none, requests were asked in turn.
        safety_kl: measured on safety conversations, nats per response token.
        limit: attack success, and false refusals, that may be added; a share.
        excluded: what is ruled out of a model that counts as safe.
        confidence: of that.
        max_safety_kl: nats per response token that a model which counts as safe may have.
        verdict: `safe`: a restore to a checkpoint with the same limits would keep it whole; `restore`: it
            answers worse than allowed, or its safety KL is above its limit; `not told apart`: neither is
            shown, and more than allowed cannot be ruled out, or the aligned model does not refuse.
        options: what was asked and how it was read, as in `RestoreReport`; empty in reports of before it was
            kept.
        warnings: what must be known besides, a sentence or two each.
        seconds: that it took, a calibration that came first included; null in reports of before it was kept.
    """

    schema_version: Literal[1] = 1
    environment: Environment
    aligned: ModelReference
    finetuned: ModelReference
    look: Look
    systems: tuple[str, ...] = ()
    safety_kl: Probe
    limit: float
    excluded: float
    confidence: float
    max_safety_kl: float
    verdict: Verdict
    options: Mapping[str, str | int | float | bool | None] = Field(
        default_factory=dict[str, str | int | float | bool | None]
    )
    warnings: tuple[str, ...]
    seconds: Seconds | None = None
