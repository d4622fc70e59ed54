"""The service's case: the fine-tuning data is at hand, and says which parts of the delta the task needs.

Minimising tr(Gᵤ(Δ'-Δ)Hᵤ(Δ'-Δ)ᵀ) + μ tr(Gₛ Δ' Hₛ Δ'ᵀ) gives Gᵤ(Δ'-Δ)Hᵤ + μ Gₛ Δ' Hₛ = 0. With Gᵤ = L Lᵀ and
Hᵤ = M Mᵀ it is the closed form for LᵀΔM, with the curvature L⁻¹GₛL⁻ᵀ and M⁻¹HₛM⁻ᵀ.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from deltaguard.restoration.curvature import Spectra
from torch import Tensor

from benchmarks.experiments.curvatures import whole
from benchmarks.experiments.laboratory import Laboratory, Trial
from deltaguard.solvers import Projection, joint_profile, project


@dataclass(frozen=True)
class _Basis:
    """Cholesky factors of the task's curvature, and the projection in its coordinates."""

    left: Tensor
    right: Tensor
    projection: Projection

    def restored(self, mu: float) -> Tensor:
        inner = torch.linalg.solve_triangular(self.left.T, self.projection.restored(mu), upper=True)
        return torch.linalg.solve_triangular(self.right, inner, upper=False, left=False)


def task_aware(
    lab: Laboratory, safety: Mapping[str, Spectra], task: Mapping[str, Spectra], *, damping: float
) -> Trial:
    """The closed form with both curvatures.

    Args:
        lab: the fine-tune.
        safety: curvature on safety conversations.
        task: the same on the task's conversations.
        damping: share of the mean eigenvalue that is added to the task's curvature; without bound it is the
            closed form that does not know the task.
    """
    factors: dict[int, Tensor] = {}
    inner: dict[tuple[int, int], object] = {}

    def factor(matrix: Tensor, key: int) -> Tensor:
        if key not in factors:
            damped = matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix))
            # On the scale of the identity, so that prices mean the same in every layer.
            factors[key] = torch.linalg.cholesky(damped / damped.diagonal().mean())
        return factors[key]

    def seen(matrix: Tensor, lower: Tensor, key: tuple[int, int]) -> object:
        if key not in inner:
            half = torch.linalg.solve_triangular(lower, matrix, upper=False)
            inner[key] = whole(torch.linalg.solve_triangular(lower, half.T, upper=False))
        return inner[key]

    found: dict[str, _Basis] = {}
    for name, delta in lab.deltas.items():
        own, other = safety[name], task[name]
        left = factor(other.outputs.dense(), id(other.outputs))
        right = factor(other.inputs.dense(), id(other.inputs))
        outputs = seen(own.outputs.dense(), left, (id(own.outputs), id(other.outputs)))
        inputs = seen(own.inputs.dense(), right, (id(own.inputs), id(other.inputs)))
        found[name] = _Basis(left, right, project(left.T @ delta @ right, inputs, outputs))  # type: ignore[arg-type]
    return Trial(
        lambda mu: lab.weights((name, basis.restored(mu)) for name, basis in found.items()),
        joint_profile(basis.projection.directions.profile() for basis in found.values()),
    )
