"""A candidate in memory with gradients, what its steps go towards, and which of its layers they change."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaguard.chat.conversations import (
    Conversation,
    build_conversations,
    everyday_prompts,
    harmless_prompts,
    sample,
)
from deltaguard.chat.tokens import context_length, encode
from deltaguard.curvature.responses import respond
from deltaguard.device import as_served, find_device
from deltaguard.errors import DeltaguardError
from deltaguard.models.loading import load_model, load_tokenizer
from deltaguard.models.mirror import loadable, output_files
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress
from deltaguard.restoration.descent import Objective, Reference, TunedLayer, descend
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.plan import Step
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.trial import Trial
from deltaguard.solvers import Spectrum, scaled_identity

CONVERSATIONS, BATCH, SEED = 32, 4, 0
"""Of each kind, as many as make a step, and the seed that they are chosen by."""

FIRST_STEP = 0.05
"""Length of the first step, as a share of what the shrink took from all layers together."""


@dataclass
class Tuning:
    """A candidate in memory whose layers are refined.

    Attributes:
        trial: the layers.
        meter: holds the model.
        layers: those that differ from the aligned model's.
        objective: what steps lower.
        mu: the price that the candidate has.
        radius: of the first step.
        before: both divergences at first, safety and task.
        taken: steps so far.
    """

    trial: Trial
    meter: SafetyMeter = field(repr=False)
    layers: Sequence[TunedLayer] = field(repr=False)
    objective: Objective = field(repr=False)
    mu: float
    radius: float
    before: tuple[float, float]
    report: Progress = field(repr=False)
    taken: int = 0

    @classmethod
    def open(cls, trial: Trial, mu: float, report: Progress) -> "Tuning":
        """Let both models answer, keep what they predict, and load the candidate of a price.

        Args:
            trial: the layers.
            mu: the price.
            report: told of each stage.

        Raises:
            DeltaguardError: a model cannot be run.
        """
        meter = _open_meter(trial, _refusals(trial, report))
        source = trial.job.finetuned
        meter.put((n, source.read(n).to(DTYPES[info.dtype])) for n, info in source.tensors.items())
        answers = _answers(trial, meter.model, meter.tokenizer, _harmless(), "finetuned", report)
        task = Reference(_mixed(meter.predicted(answers)))
        safety = Reference(_mixed(meter.known))
        meter.put(trial.others())
        # Not all of them beside the model on the device.
        found = {name: tensor.cpu() for name, tensor in trial.weights(mu)}
        # In one order, whichever process sent which first: sums of floats depend on it.
        weights = {step.info.name: found[step.info.name] for step in trial.steps if step.info.name in found}
        lost = 0.0
        for name, tensor in weights.items():
            lost += float((tensor.double() - source.read(name).double()).square().sum())
        meter.put(weights.items())
        before = safety.mean(meter.model), task.mean(meter.model)
        limit = trial.config.dial
        assert limit is not None, "the dial alone is refined"  # noqa: S101
        objective = Objective(safety, task, max(before[0], limit), max(before[1], limit))
        layers = _layers(trial, meter, weights.keys())
        return cls(trial, meter, layers, objective, mu, FIRST_STEP * math.sqrt(lost), before, report)

    def run(self, steps: int) -> "Tuning":
        """Take steps from where the candidate is.

        Raises:
            DeltaguardError: memory does not suffice.
        """
        try:
            self.taken += descend(
                self.meter.model,
                self.layers,
                self.objective,
                steps=steps,
                mu=self.mu,
                radius=self.radius,
                report=self.report,
            )
        except torch.OutOfMemoryError as error:
            raise DeltaguardError(
                f"Too little memory to refine with gradients: take another device, or no --refine. {error}"
            ) from error
        return self

    def divergences(self) -> tuple[float, float]:
        """Measure both divergences as they are now, safety and task."""
        return self.objective.safety.mean(self.meter.model), self.objective.task.mean(self.meter.model)

    def tensors(self) -> dict[str, Tensor]:
        """Copy the layers as they will be on disk."""
        infos = self.trial.job.finetuned.tensors
        return {
            layer.name: layer.weight.detach().to("cpu", DTYPES[infos[layer.name].dtype], copy=True)
            for layer in self.layers
        }


def _refusals(trial: Trial, report: Progress) -> list[Conversation]:
    """Let the aligned model answer the package's calibration prompts, whatever the store was made from."""
    job = trial.job
    source = job.aligned.folder, job.aligned.reference
    model = load_model(*source, dtype=torch.float32).to(find_device(trial.config.device))
    asked = build_conversations(CONVERSATIONS, seed=SEED)
    return _answers(trial, model, load_tokenizer(*source), asked, "aligned", report)


def _harmless() -> list[Conversation]:
    """Choose harmless prompts: as many look-alikes as plain ones."""
    rows = (*sample(everyday_prompts(), CONVERSATIONS // 2, seed=SEED),)
    rows += (*sample(harmless_prompts("training"), CONVERSATIONS - len(rows), seed=SEED),)
    return [Conversation(row.prompt) for row in rows]


def _answers(
    trial: Trial, model: Any, tokenizer: Any, asked: Sequence[Conversation], who: str, report: Progress
) -> list[Conversation]:
    """Let a model answer, as at a calibration; what has no token of an answer is left out."""
    known = known_store(trial.job).provenance
    with as_served(model):
        answered = respond(
            model,
            tokenizer,
            asked,
            max_new_tokens=known.max_new_tokens,
            batch_size=known.batch_size,
            on_batch=lambda done, total: report(Event(f"{who} answers", done, total)),
        )
    limit = context_length(model.config, known.max_length)
    return [each for each in answered if encode(tokenizer, each, max_length=limit).has_response]


def _open_meter(trial: Trial, refusals: Sequence[Conversation]) -> SafetyMeter:
    job, config = trial.job, trial.config
    with loadable(output_files(job.aligned, job.finetuned, config_from=config.config_from)) as output:
        return SafetyMeter.open(
            job.aligned,
            job.finetuned,
            refusals,
            output=output,
            device=find_device(config.device),
            dtype=torch.float32,
            batch_size=BATCH,
            max_length=known_store(job).provenance.max_length,
        )


def _mixed(batches: Sequence[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    """Take batches, which come longest first, from both ends in turn."""
    half = (len(batches) + 1) // 2
    pairs = zip(batches[:half], [*reversed(batches[half:]), None], strict=False)
    return [each for pair in pairs for each in pair if each is not None]


def _layers(trial: Trial, meter: SafetyMeter, names: Collection[str]) -> list[TunedLayer]:
    store, device = known_store(trial.job), meter.model.device
    shared: dict[str, Spectrum] = {}
    found: list[TunedLayer] = []
    for step in trial.steps:
        if step.info.name not in names or step.group is None:
            continue
        if step.group not in shared:
            shared[step.group] = store.input_spectrum(step.group).to(device)
        inputs, outputs = shared[step.group], output_curvature(trial, step).to(device)
        found.append(
            TunedLayer(step.info.name, meter.place(step.info.name), step.transposed, inputs, outputs)
        )
    return found


def output_curvature(trial: Trial, step: Step) -> Spectrum:
    """Give G as the method has it: its eigenpairs, or their mean."""
    store = known_store(trial.job)
    if "outputs" in trial.config.chosen_method.needs:
        return store.output_spectrum(step.aligned_name)
    mean = store.output_mean(step.aligned_name)
    return scaled_identity(step.matrix_shape[0], mean, like=torch.empty(0))
