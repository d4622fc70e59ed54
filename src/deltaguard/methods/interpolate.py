"""`interpolate` and `wise-ft`: weights between the aligned and the fine-tuned ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaguard.methods.method import Layer, Method, Options, PreparedLayer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deltaguard.solvers import Solution


class Interpolate(Method):
    """aligned + strength · delta, in the linear layers of the decoder blocks."""

    name = "interpolate"
    title = "interpolation: every entry between the aligned and the fine-tuned value"
    reference = "WiSE-FT: Wortsman et al., CVPR 2022, arXiv:2109.01903"

    def prepare(self, layer: Layer, options: Options) -> PreparedLayer:  # noqa: ARG002
        """Take the two weights."""
        return _BetweenLayer(*layer.weights)


class WiseFt(Interpolate):
    """aligned + strength · delta, in every tensor."""

    name = "wise-ft"
    title = "WiSE-FT: interpolation of every tensor"
    everywhere = True
    ladder = (0.02, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class _BetweenLayer(PreparedLayer):
    aligned: Tensor
    finetuned: Tensor

    def at(self, price: float) -> Solution:
        from deltaguard.solvers import interpolate

        return interpolate(self.aligned, self.finetuned, alpha=price)

    def rounded_at(self, price: float, dtype: torch.dtype) -> Solution:
        from deltaguard.solvers import interpolate

        return interpolate(self.aligned, self.finetuned, alpha=price, dtype=dtype)
