"""A second step, re-linearised at the restored model: down the gradient of the measured safety KL."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.laboratory import Laboratory
from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch
from deltaguard.restoration.curvature import Spectra
from deltaguard.solvers import project


class Refiner:
    """Gradients of safety KL on calibration conversations, at any candidate."""

    def __init__(self, lab: Laboratory, model: Any, batches: Sequence[Batch]) -> None:
        """Keep what the aligned model predicts.

        Args:
            lab: the fine-tune.
            model: the aligned model; it takes on the candidates' weights.
            batches: calibration conversations.
        """
        self._lab, self._model, self._batches = lab, model, batches
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        with torch.no_grad():
            self._aligned = [self._log_probs(batch) for batch in batches]

    def step(
        self, deltas: Mapping[str, Tensor], spectra: Mapping[str, Spectra], mu: float
    ) -> dict[str, Tensor]:
        """One step from Δ' against the gradient of safety KL, preconditioned by I + μ G ⊗ H.

        Its length is the one at which safety KL on the calibration conversations is smallest among halvings
        of the first: what the prediction leaves out, layers that add up, makes a whole step too long.
        """
        before, gradients = self._gradients(deltas)
        step = {
            name: project(gradients[name], spectra[name].inputs, spectra[name].outputs).restored(mu)
            for name in deltas
        }
        slope = sum(float((gradients[name] * step[name]).sum()) for name in deltas)
        # Where safety KL is about quadratic, its minimum along the step lies at twice its value by the slope.
        length = 2 * before / slope
        tried: dict[float, float] = {0.0: before}
        for _ in range(4):
            tried[length] = self._kl(_less(deltas, step, length))
            if len(tried) > 2 and tried[length] > tried[2 * length]:
                break
            length /= 2
        chosen = min(tried, key=lambda each: tried[each])
        print(f"  refined: calibration KL {before:.2e}, by length {tried}", flush=True)
        return _less(deltas, step, chosen)

    def _gradients(self, deltas: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        with self._candidate(deltas):
            for name in deltas:
                self._parameters[name].requires_grad_(True)
            value, count = 0.0, sum(len(known) for known in self._aligned)
            with torch.enable_grad():
                for batch, known in zip(self._batches, self._aligned, strict=True):
                    loss = _divergence(known, self._log_probs(batch)) / count
                    loss.backward()
                    value += float(loss.detach())
            found: dict[str, Tensor] = {}
            for name in deltas:
                gradient = self._parameters[name].grad
                assert gradient is not None
                found[name] = gradient
                self._parameters[name].grad = None
                self._parameters[name].requires_grad_(False)
        return value, found

    @torch.no_grad()
    def _kl(self, deltas: Mapping[str, Tensor]) -> float:
        with self._candidate(deltas):
            terms = [
                float(_divergence(known, self._log_probs(batch)))
                for batch, known in zip(self._batches, self._aligned, strict=True)
            ]
        return sum(terms) / sum(len(known) for known in self._aligned)

    @contextmanager
    def _candidate(self, deltas: Mapping[str, Tensor]) -> Generator[None]:
        aligned = {name: self._parameters[name].detach().clone() for name in deltas}
        with torch.no_grad():
            for name, weight in self._lab.weights(deltas.items()):
                self._parameters[name].copy_(weight)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in aligned.items():
                    self._parameters[name].copy_(weight)

    def _log_probs(self, batch: Batch) -> Tensor:
        return logits_at(self._model, batch.ids, batch.mask, batch.answering).float().log_softmax(-1)


def _divergence(aligned: Tensor, candidate: Tensor) -> Tensor:
    return (aligned.exp() * (aligned - candidate)).sum()


def _less(deltas: Mapping[str, Tensor], step: Mapping[str, Tensor], length: float) -> dict[str, Tensor]:
    return {name: delta - length * step[name] for name, delta in deltas.items()}
