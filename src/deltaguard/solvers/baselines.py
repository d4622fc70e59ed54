"""Methods that know no curvature: interpolation, RESTA, Safe LoRA and SafeMERGE.

Safe LoRA and SafeMERGE judge a delta by the subspace in which alignment moved the layer. With V = aligned -
pretrained, both measure how well a delta keeps to the column space of V through C = V Vᵀ / ‖V‖ (Frobenius),
which Safe LoRA takes in place of the exact projection V (VᵀV)⁻¹ Vᵀ because it needs no inverse. C is no
projection: it also scales, by σ² / ‖V‖ along each singular direction of V.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.solvers.solution import (
    Solution,
    cached_blocks,
    check_matrices,
    check_shapes,
    is_finite,
    row_blocks,
    share,
    squared_norm,
    working_dtype,
)


def interpolate(
    aligned: Tensor, finetuned: Tensor, *, alpha: float, dtype: torch.dtype | None = None
) -> Solution:
    """Interpolate between the aligned and the fine-tuned weight (WiSE-FT; Wortsman et al., 2022).

    Args:
        aligned: aligned weight, any shape (out, in).
        finetuned: fine-tuned weight of the same shape.
        alpha: share of the delta that is kept, in [0, 1]; both ends are exact.
        dtype: what the weight is rounded to; the working precision where absent.

    Returns:
        aligned + alpha · delta. `kept_energy` is alpha, `safety_cost` NaN: no curvature is known.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or alpha is outside [0, 1].

    Example:
        >>> import torch
        >>> interpolate(torch.zeros(1, 1), torch.ones(1, 1), alpha=0.25).weight.item()
        0.25
    """
    check_shapes(aligned, finetuned)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1].")
    working = working_dtype(aligned, finetuned)
    weight = torch.empty(aligned.shape, dtype=dtype or working, device=aligned.device)
    norm = 0.0
    for rows in cached_blocks(aligned):
        base, target = aligned[rows].to(working), finetuned[rows].to(working)
        norm += squared_norm(target - base)
        weight[rows].copy_(torch.lerp(base, target, alpha))
    if not math.isfinite(norm):
        check_matrices(aligned, finetuned)
    return Solution(
        weight=weight,
        kept_energy=alpha,
        safety_cost=math.nan,
        utility_loss=(1 - alpha) ** 2,
        detail={"delta_norm": math.sqrt(norm)},
    )


def resta(finetuned: Tensor, safety_vector: Tensor, *, gamma: float) -> Tensor:
    """Add a safety vector: task arithmetic (RESTA; Bhardwaj et al., ACL 2024, arXiv:2402.11746).

    The paper's plain variant; its other one first drops and rescales entries of the delta (DARE).

    Args:
        finetuned: fine-tuned weight, any shape.
        safety_vector: aligned - unaligned weight of the same shape, where the unaligned model is the aligned
            one after fine-tuning on harmful data.
        gamma: the paper's γ, how much of the vector is added; 0 gives the fine-tuned weight exactly.

    Returns:
        finetuned + gamma · safety_vector, in the working precision. Not a `Solution`: without the aligned
        weight, what is kept of the delta cannot be said.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or gamma is negative or not finite.

    Example:
        >>> import torch
        >>> resta(torch.ones(2), torch.tensor([0.0, -2.0]), gamma=0.5).tolist()
        [1.0, 0.0]
    """
    if finetuned.shape != safety_vector.shape:
        raise ValueError(
            f"The fine-tuned weight is {tuple(finetuned.shape)} and the safety vector "
            f"{tuple(safety_vector.shape)}: the same shape is needed."
        )
    if not (is_finite(finetuned) and is_finite(safety_vector)):
        raise ValueError("The fine-tuned weight or the safety vector holds NaN or infinite entries.")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma}; it must lie in [0, infinity).")
    dtype = working_dtype(finetuned, safety_vector)
    return torch.add(finetuned.to(dtype), safety_vector.to(dtype), alpha=gamma)


def safe_lora(aligned: Tensor, finetuned: Tensor, pretrained: Tensor, *, threshold: float) -> Solution:
    """Run Safe LoRA (Hsu et al., NeurIPS 2024, arXiv:2405.16833) on any delta, not on adapters alone.

    If cos⟨Δ, C Δ⟩ is below the threshold, the delta is replaced by C Δ, else it stays. The paper leaves two
    cases of the cosine undefined: here it is 1 for a delta of zero, which leaves nothing, and 0 where C Δ is
    zero, which includes every layer that alignment did not change.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight, (out, in).
        pretrained: weight of the model before alignment, (out, in).
        threshold: the paper's τ. The cosine lies in [0, 1], so 0 or less keeps every delta and a number
            above 1 projects every one.

    Returns:
        The weight. `kept_entries` is 1 or 0, `safety_cost` NaN: no curvature is known. `detail` holds the
        cosine as `similarity`.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or the threshold is NaN.

    Example:
        >>> import torch
        >>> zero, delta = torch.zeros(2, 1), torch.tensor([[3.0], [4.0]])
        >>> safe_lora(zero, delta, torch.tensor([[-1.0], [0.0]]), threshold=0.7).weight.tolist()
        [[3.0], [0.0]]
    """
    layer = _layer(aligned, finetuned, pretrained)
    projected = _project(layer)
    return _solution(layer, projected, threshold, lambda rows: projected.delta[rows] + aligned[rows])


def safe_merge(
    aligned: Tensor, finetuned: Tensor, safe: Tensor, pretrained: Tensor, *, threshold: float, alpha: float
) -> Solution:
    """Run SafeMERGE (Djuhera et al., 2025, arXiv:2503.17239) with its linear merge.

    If cos⟨Δ, C Δ⟩ is below the threshold, the delta is replaced by alpha · Δ + (1 - alpha) · Δ_safe, where
    Δ_safe = safe - aligned; else it stays.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight, (out, in).
        safe: weight of the aligned model after fine-tuning on safety data, (out, in).
        pretrained: weight of the model before alignment, (out, in).
        threshold: as in `safe_lora`.
        alpha: share of the fine-tuned delta in a merged layer, in [0, 1].

    Returns:
        The weight. `kept_entries` is 1 or 0, `safety_cost` NaN: no curvature is known.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or an option is out of range.

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(2, 1), torch.ones(2, 1)
        >>> safe_merge(zero, one, -one, torch.tensor([[1.0], [0.0]]), threshold=1, alpha=0.75).weight.tolist()
        [[0.5], [0.5]]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1].")
    layer = _layer(aligned, finetuned, pretrained, safe=safe)

    def merged(rows: slice) -> Tensor:
        # aligned + alpha · Δ + (1 - alpha) · Δ_safe lies between the two fine-tuned weights.
        return torch.lerp(safe[rows].to(layer.dtype), finetuned[rows].to(layer.dtype), alpha)

    return _solution(layer, _project(layer), threshold, merged)


@dataclass(frozen=True)
class _Layer:
    """The matrices of a layer, read in the working precision a block of rows at a time."""

    aligned: Tensor
    finetuned: Tensor
    pretrained: Tensor
    dtype: torch.dtype

    def delta(self, rows: slice) -> Tensor:
        return self.finetuned[rows].to(self.dtype) - self.aligned[rows].to(self.dtype)

    def alignment(self, rows: slice) -> Tensor:
        return self.aligned[rows].to(self.dtype) - self.pretrained[rows].to(self.dtype)


def _layer(aligned: Tensor, finetuned: Tensor, pretrained: Tensor, **others: Tensor) -> _Layer:
    check_matrices(aligned, finetuned)
    for name, weight in (("pretrained", pretrained), *others.items()):
        if weight.shape != aligned.shape:
            raise ValueError(
                f"The aligned weight is {tuple(aligned.shape)} and the {name} one {tuple(weight.shape)}: "
                "the same shape is needed."
            )
        if not is_finite(weight):
            raise ValueError(f"The {name} weight holds NaN or infinite entries.")
    dtype = working_dtype(aligned, finetuned, pretrained, *others.values())
    return _Layer(aligned, finetuned, pretrained, dtype)


@dataclass(frozen=True)
class _Projected:
    """C Δ in memory of its own, and the squared norm and similarity of Δ."""

    delta: Tensor
    squared_norm: float
    similarity: float


def _project(layer: _Layer) -> _Projected:
    """Compute V (Vᵀ Δ) / ‖V‖: V Vᵀ, as large as the outputs squared, is never formed."""
    columns = layer.aligned.shape[1]
    inner = torch.zeros((columns, columns), dtype=layer.dtype, device=layer.aligned.device)
    delta_norm = alignment_norm = projected_norm = 0.0
    for rows in row_blocks(layer.aligned):
        delta, alignment = layer.delta(rows), layer.alignment(rows)
        inner.addmm_(alignment.T, delta)
        delta_norm += squared_norm(delta)
        alignment_norm += squared_norm(alignment)
    inner /= math.sqrt(alignment_norm) or 1.0
    projected = torch.empty(layer.aligned.shape, dtype=layer.dtype, device=layer.aligned.device)
    for rows in row_blocks(projected):
        torch.mm(layer.alignment(rows), inner, out=projected[rows])
        projected_norm += squared_norm(projected[rows])
    # ⟨Δ, C Δ⟩ = ‖Vᵀ Δ‖² / ‖V‖, written so that rounding cannot make it negative.
    product = math.sqrt(alignment_norm) * squared_norm(inner)
    cosine = min(share(product, math.sqrt(delta_norm * projected_norm)), 1.0)
    return _Projected(projected, delta_norm, cosine if delta_norm > 0 else 1.0)


def _solution(
    layer: _Layer, projected: _Projected, threshold: float, replaced: Callable[[slice], Tensor]
) -> Solution:
    """Keep the fine-tuned weight from a similarity on, and replace it below, some rows at a time."""
    if math.isnan(threshold):
        raise ValueError("threshold is NaN; it must be a number.")
    weight, kept, lost = projected.delta, projected.squared_norm, 0.0
    if projected.similarity >= threshold:
        weight.copy_(layer.finetuned)
    else:
        kept = 0.0
        for rows in row_blocks(weight):
            weight[rows] = replaced(rows)
            kept += float(((weight[rows] - layer.aligned[rows]) * layer.delta(rows)).sum(dtype=torch.float64))
            lost += squared_norm(weight[rows] - layer.finetuned[rows])
    return Solution(
        weight=weight,
        kept_energy=share(kept, projected.squared_norm),
        kept_entries=0.0 if lost else 1.0,
        safety_cost=math.nan,
        utility_loss=share(lost, projected.squared_norm),
        detail={"delta_norm": math.sqrt(projected.squared_norm), "similarity": projected.similarity},
    )
