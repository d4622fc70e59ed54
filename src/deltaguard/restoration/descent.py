"""Natural gradient steps on a few layers of a loaded model, towards what two models predict.

A step is W - r d / ‖d‖ with d = (I + μ G ⊗ H)⁻¹ ∇L for every layer, ‖d‖ over all of them: the closed form's
shrinking, of a gradient in the place of a delta.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaguard.chat.predictions import response_logits
from deltaguard.chat.tokens import Batch
from deltaguard.progress import Event, Progress
from deltaguard.solvers import Spectrum, shrink

_GROW, _HALVINGS = 1.5, 5
"""What a radius grows by where it served at once, and how often it is halved at most in one step."""


@dataclass(frozen=True)
class Reference:
    """What a model predicts for responses, in batches that steps take in turn.

    Attributes:
        batches: conversations, and log-probabilities for their response tokens, (tokens, vocabulary).
    """

    batches: Sequence[tuple[Batch, Tensor]]

    def divergence(self, model: Any, number: int) -> Tensor:
        """Compute KL(reference ‖ model) on a batch, nats per response token, with a gradient if one is on.

        Args:
            model: a transformers causal language model.
            number: of the batch, which starts again from the first after the last.
        """
        batch, known = self.batches[number % len(self.batches)]
        return _divergence(model, batch, known) / len(known)

    @torch.no_grad()
    def mean(self, model: Any) -> float:
        """Compute KL(reference ‖ model) on all batches, nats per response token."""
        sums = [float(_divergence(model, batch, known)) for batch, known in self.batches]
        return math.fsum(sums) / sum(len(known) for _, known in self.batches)


@dataclass(frozen=True)
class Objective:
    """L = KL(aligned ‖ candidate) / s + KL(fine-tuned ‖ candidate) / t, each on conversations of its own.

    Attributes:
        safety: what the aligned model predicts for its own answers to harmful requests.
        task: what the fine-tuned one predicts for its own answers to harmless ones.
        safety_scale: s, nats per response token, positive.
        task_scale: t, likewise.
    """

    safety: Reference
    task: Reference
    safety_scale: float
    task_scale: float

    def on(self, model: Any, number: int) -> Tensor:
        """Compute it on one batch of each kind, with a gradient if one is on."""
        safety = self.safety.divergence(model, number) / self.safety_scale
        return safety + self.task.divergence(model, number) / self.task_scale

    def of(self, safety: float, task: float) -> float:
        """Compute it from both divergences."""
        return safety / self.safety_scale + task / self.task_scale


@dataclass(frozen=True)
class TunedLayer:
    """A layer that steps may change.

    Attributes:
        name: of its tensor.
        weight: the parameter that holds it, on the model's device.
        transposed: whether that is (in, out).
        inputs: of H, on that device.
        outputs: of G.
    """

    name: str
    weight: Tensor
    transposed: bool
    inputs: Spectrum
    outputs: Spectrum

    def direction(self, mu: float) -> Tensor:
        """Precondition the weight's gradient, in the weight's shape, and forget it.

        Args:
            mu: the inverse of the damping.
        """
        gradient, self.weight.grad = self.weight.grad, None
        assert gradient is not None, "the loss depends on every layer"  # noqa: S101
        matrix = gradient.T if self.transposed else gradient
        found = shrink(matrix, self.inputs, self.outputs, mu=mu)
        return found.T if self.transposed else found


def descend(
    model: Any,
    layers: Sequence[TunedLayer],
    objective: Objective,
    *,
    steps: int,
    mu: float,
    radius: float,
    report: Progress,
) -> int:
    """Take steps on the layers of a model, in place; each lowers the loss of the batch that it was made for.

    A step that does not is halved, up to five times, and then left out. Everything is in the order given, so
    that the same arithmetic gives the same weights.

    Args:
        model: a transformers causal language model in evaluation mode.
        layers: its layers that are changed; no other parameter takes a gradient.
        objective: what is lowered.
        steps: how many are tried.
        mu: the inverse of the damping.
        radius: the length of the first step over all layers, Frobenius.
        report: told of each step.

    Returns:
        How many steps were taken.
    """
    model.requires_grad_(False)
    for layer in layers:
        layer.weight.requires_grad_(True)
    taken = 0
    try:
        for number in range(steps):
            with torch.enable_grad():
                loss = objective.on(model, number)
                loss.backward()
            directions = [layer.direction(mu) for layer in layers]
            length = math.sqrt(math.fsum(_squared(each) for each in directions))
            used = _advance(
                model, layers, directions, objective, number, float(loss.detach()), length, radius
            )
            taken += used > 0
            radius = _GROW * radius if used == radius else used or radius / 2**_HALVINGS
            report(Event("refine", number + 1, steps, f"loss {float(loss.detach()):.4g}, step of {used:.3g}"))
    finally:
        model.requires_grad_(False)
    return taken


@torch.no_grad()
def _advance(
    model: Any,
    layers: Sequence[TunedLayer],
    directions: Sequence[Tensor],
    objective: Objective,
    number: int,
    before: float,
    length: float,
    radius: float,
) -> float:
    """Find the longest step that lowers the loss of its batch, and take it; give its length, 0 of none."""
    if not (0 < length < math.inf):
        return 0.0
    weights = [layer.weight.clone() for layer in layers]
    for halvings in range(_HALVINGS + 1):
        step = radius / 2**halvings
        for layer, weight, direction in zip(layers, weights, directions, strict=True):
            torch.add(weight, direction, alpha=-step / length, out=layer.weight)
        if float(objective.on(model, number)) < before:
            return step
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight)
    return 0.0


def _divergence(model: Any, batch: Batch, known: Tensor) -> Tensor:
    """Sum KL over response tokens; as `SafetyMeter.measure`, over the vocabulary of what is known."""
    found = response_logits(model, batch).to(known.dtype).log_softmax(dim=-1)[:, : known.shape[1]]
    return (known.exp() * (known - found)).sum()


def _squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
