"""A tensor that stacks the matrices of experts: each is restored by itself, and all are written as one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.methods.method import PreparedLayer, PricedLayer
from deltaguard.solvers import Profile, Solution, joint_profile
from deltaguard.solvers.solution import share


@dataclass(frozen=True)
class Stacked(PricedLayer):
    """The matrices of a stack, ready for any price.

    Attributes:
        matrices: each prepared, or the fine-tuned one, (out, in), where that has no delta.
    """

    matrices: tuple[PreparedLayer | Tensor, ...]

    def at(self, price: float) -> Solution:
        """Restore each matrix; the weight is (experts, out, in)."""
        found = [each if isinstance(each, Tensor) else each.at(price) for each in self.matrices]
        solutions = [each for each in found if isinstance(each, Solution)]
        like = solutions[0].weight
        weight = torch.stack([each.to(like) if isinstance(each, Tensor) else each.weight for each in found])
        norms = [each.detail["delta_norm"] ** 2 for each in solutions]
        detail = {"delta_norm": math.sqrt(sum(norms))}
        if "shift_norm" in solutions[0].detail:
            detail["shift_norm"] = math.sqrt(sum(each.detail["shift_norm"] ** 2 for each in solutions))
        if "predicted_safety_kl" in solutions[0].detail:
            detail["predicted_safety_kl"] = sum(each.detail["predicted_safety_kl"] for each in solutions)
        selected = [each.kept_entries for each in solutions if each.kept_entries is not None]
        return Solution(
            weight=weight,
            # Of no delta all is kept.
            kept_energy=_mean([each.kept_energy for each in solutions], norms) if sum(norms) else 1.0,
            kept_entries=sum(selected) / len(selected) if selected else None,
            safety_cost=_mean([each.safety_cost for each in solutions], norms),
            utility_loss=_mean([each.utility_loss for each in solutions], norms),
            detail=detail,
        )

    def profile(self) -> Profile:
        """Say how the deltas of all matrices together are spread over prices."""
        return joint_profile([each.profile() for each in self.matrices if isinstance(each, PricedLayer)])


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return share(sum(value * weight for value, weight in zip(values, weights, strict=True)), sum(weights))
