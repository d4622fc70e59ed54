"""`safe-merge`: layers that leave the alignment subspace are merged with a safe model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaguard.methods.method import Layer, Method, Options, PreparedLayer
from deltaguard.methods.safe_lora import LADDER

if TYPE_CHECKING:
    from torch import Tensor

    from deltaguard.solvers import Solution

MERGED_SHARE = 0.5
"""SafeMERGE's alpha: how much of the fine-tuned delta a merged layer keeps. A choice made here."""


class SafeMerge(Method):
    """A layer whose similarity is below the threshold, 1 - strength, keeps half of its delta."""

    name = "safe-merge"
    title = "SafeMERGE: layers that leave the alignment subspace are merged with a safe model's"
    reference = "Djuhera et al., 2025, arXiv:2503.17239; the threshold is 1 - strength"
    models = ("safe", "pretrained")
    ladder = LADDER

    def prepare(self, layer: Layer, options: Options) -> PreparedLayer:  # noqa: ARG002
        """Take the weights of the four models."""
        return _MergedLayer(*layer.weights, layer.others["safe"], layer.others["pretrained"])


@dataclass(frozen=True)
class _MergedLayer(PreparedLayer):
    aligned: Tensor
    finetuned: Tensor
    safe: Tensor
    pretrained: Tensor

    def at(self, price: float) -> Solution:
        from deltaguard.solvers import safe_merge

        weights = (self.aligned, self.finetuned, self.safe, self.pretrained)
        return safe_merge(*weights, threshold=1 - price, alpha=MERGED_SHARE)
