"""`safe-lora`: deltas that leave the alignment subspace are projected into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaguard.methods.method import Layer, Method, Options, PreparedLayer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaguard.solvers import Solution

# Layers of SmolLM2-135M after the demo's fine-tunes have similarities of 0.11 to 0.58 (random matrices: about
# 0.7); those that its alignment froze have 0 and are edited at any of these.
LADDER = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class SafeLora(Method):
    """A layer whose similarity is below the threshold, 1 - strength, is projected."""

    name = "safe-lora"
    title = "Safe LoRA: layers that leave the alignment subspace are projected into it"
    reference = "Hsu et al., NeurIPS 2024, arXiv:2405.16833; the threshold is 1 - strength"
    models = ("pretrained",)
    ladder = LADDER

    def prepare(self, layer: Layer, options: Options) -> PreparedLayer:  # noqa: ARG002
        """Take the weights of the three models."""
        return _SubspaceLayer(*layer.weights, layer.others["pretrained"])


@dataclass(frozen=True)
class _SubspaceLayer(PreparedLayer):
    aligned: Tensor
    finetuned: Tensor
    pretrained: Tensor

    def at(self, price: float) -> Solution:
        from deltaguard.solvers import safe_lora

        return safe_lora(self.aligned, self.finetuned, self.pretrained, threshold=1 - price)
