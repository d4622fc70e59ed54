"""`resta`: a safety vector added to every tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaguard.methods.method import Layer, Method, Options, PreparedLayer, Strengths

if TYPE_CHECKING:
    from torch import Tensor

    from deltaguard.solvers import Solution


class Resta(Method):
    """finetuned + γ (aligned - unaligned), γ = 1 - strength; strength 0 adds the vector once."""

    name = "resta"
    title = "RESTA: a safety vector added"
    reference = "Bhardwaj et al., ACL 2024, arXiv:2402.11746; gamma is 1 - strength"
    models = ("unaligned",)
    everywhere = True
    without_delta = True
    ladder = (-0.5, 0.0, 0.1, 0.25, 0.4, 0.5, 0.75)

    def strengths(self, options: Options) -> Strengths:  # noqa: ARG002
        """Below 0 the vector is added more than once."""
        return Strengths(low=-1.0)

    def prepare(self, layer: Layer, options: Options) -> PreparedLayer:  # noqa: ARG002
        """Compute the safety vector."""
        from deltaguard.solvers.solution import working_dtype

        aligned, finetuned = layer.weights
        unaligned = layer.others["unaligned"]
        dtype = working_dtype(aligned, unaligned)
        return _ShiftedLayer(aligned, finetuned, aligned.to(dtype) - unaligned.to(dtype))


@dataclass(frozen=True)
class _ShiftedLayer(PreparedLayer):
    aligned: Tensor
    finetuned: Tensor
    vector: Tensor

    def at(self, price: float) -> Solution:
        from deltaguard.solvers import Solution, resta
        from deltaguard.solvers.solution import share, squared_norm

        weight = resta(self.finetuned, self.vector, gamma=1 - price)
        delta = self.finetuned.to(weight.dtype) - self.aligned.to(weight.dtype)
        lost, energy = weight - self.finetuned.to(weight.dtype), squared_norm(delta)
        return Solution(
            weight=weight,
            kept_energy=1 + share(float((lost.double() * delta.double()).sum()), energy),
            kept_entries=None,
            safety_cost=math.nan,
            utility_loss=share(squared_norm(lost), energy),
            detail={"delta_norm": math.sqrt(energy), "shift_norm": math.sqrt(squared_norm(lost))},
        )
