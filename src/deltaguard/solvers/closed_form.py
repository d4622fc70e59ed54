"""The exact optimum of Safe Delta's own goal: keep the delta, bound the safety loss, nothing all-or-nothing.

Minimising ‖Δ' - Δ‖² + μ tr(G Δ' H Δ'ᵀ) gives Δ' + μ G Δ' H = Δ. In the eigenbases of G and H, with
eigenvalues g and h, that is Δ'_ab = Δ_ab / (1 + μ g_a h_b). `kfac` takes both matrices (K-FAC's curvature;
Martens and Grosse 2015, arXiv:1503.05671), `ridge` has G = I.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.solvers.solution import Solution, check_hessian, check_matrices, share, working_dtype


@dataclass(frozen=True)
class Spectrum:
    """A curvature matrix in its eigenbasis.

    Attributes:
        values: (n,), rising; none negative.
        vectors: (n, n); column i belongs to value i.
    """

    values: Tensor
    vectors: Tensor


def spectrum(curvature: Tensor) -> Spectrum:
    """The eigendecomposition of a second moment; eigenvalues that rounding made negative become 0.

    Args:
        curvature: symmetric and positive semi-definite but for rounding, (n, n).
    """
    values, vectors = torch.linalg.eigh(curvature.to(working_dtype(curvature)))
    return Spectrum(values.clamp_min(0), vectors)


def ridge(aligned: Tensor, finetuned: Tensor, hessian: Tensor, *, mu: float) -> Solution:
    """Δ' = Δ (I + μH)⁻¹.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight of the same shape.
        hessian: H, the mean of x xᵀ over the layer's inputs on safety conversations, (in, in).
        mu: price of the safety loss, 0 or more; 0 gives the fine-tuned weight and infinity the aligned one,
            exactly.

    Returns:
        The optimum; `kept_fraction` is the mean of 1 / (1 + μh) over the eigenvalues of H.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, or `mu` is negative or NaN.

    Example:
        >>> import torch
        >>> ridge(torch.zeros(1, 2), torch.ones(1, 2), torch.diag(torch.tensor([0.0, 1.0])), mu=1.0).weight
        tensor([[1.0000, 0.5000]])
    """
    check_matrices(aligned, finetuned)
    check_hessian(hessian, aligned.shape[1])
    return closed_form(aligned, finetuned, spectrum(hessian), None, mu=mu)


def kfac(
    aligned: Tensor, finetuned: Tensor, hessian: Tensor, output_hessian: Tensor, *, mu: float
) -> Solution:
    """The solution of Δ' + μ G Δ' H = Δ.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight of the same shape.
        hessian: H, as in `ridge`, (in, in).
        output_hessian: G, the mean of g gᵀ over gradients g of log-probabilities with respect to the layer's
            output, (out, out).
        mu: as in `ridge`. With it in nats, one value serves all layers.

    Returns:
        The optimum; `kept_fraction` is the mean of 1 / (1 + μgh) over pairs of eigenvalues. `detail` holds
        `safety_kl_share`, tr(G Δ' H Δ'ᵀ) / tr(G Δ H Δᵀ).

    Raises:
        ValueError: as `ridge`, or G does not fit.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> kfac(0 * one, one, one, 3 * one, mu=1.0).weight
        tensor([[0.2500]])
    """
    check_matrices(aligned, finetuned)
    check_hessian(hessian, aligned.shape[1])
    check_hessian(output_hessian, aligned.shape[0])
    return closed_form(aligned, finetuned, spectrum(hessian), spectrum(output_hessian), mu=mu)


def closed_form(
    aligned: Tensor, finetuned: Tensor, inputs: Spectrum, outputs: Spectrum | None, *, mu: float
) -> Solution:
    """`kfac` from eigendecompositions, which serve every fine-tune and every `mu`; `ridge` without `outputs`.

    Args:
        aligned: as in `kfac`.
        finetuned: as in `kfac`.
        inputs: of H.
        outputs: of G, None for the identity.
        mu: as in `kfac`.

    Raises:
        ValueError: `mu` is negative or NaN.
    """
    if not mu >= 0:
        raise ValueError(f"mu is {mu}; it must be 0 or more.")
    dtype = working_dtype(aligned, finetuned, inputs.values)
    base = aligned.to(dtype)
    delta = finetuned.to(dtype) - base
    rotated = delta @ inputs.vectors.to(dtype)
    if outputs is not None:
        rotated = outputs.vectors.T.to(dtype) @ rotated
    costs = inputs.values.to(dtype)[None, :]
    weights = costs if outputs is None else outputs.values.to(dtype)[:, None] * costs
    factors = 1 / (1 + mu * weights) if math.isfinite(mu) else torch.zeros_like(weights)
    kept = rotated * factors
    return Solution(
        weight=_weight(base, finetuned.to(dtype), kept, inputs, outputs, mu),
        kept_fraction=float(factors.mean(dtype=torch.float64)),
        safety_cost=_share_of(kept, rotated, costs),
        utility_loss=share(_sum(torch.square(rotated - kept)), _sum(rotated.square())),
        detail={
            "delta_norm": math.sqrt(_sum(delta.square())),
            "safety_kl_share": _share_of(kept, rotated, weights),
        },
    )


def _weight(
    base: Tensor, finetuned: Tensor, kept: Tensor, inputs: Spectrum, outputs: Spectrum | None, mu: float
) -> Tensor:
    if mu == 0:
        return finetuned.clone()
    if math.isinf(mu):
        return base.clone()
    if outputs is not None:
        kept = outputs.vectors.to(kept.dtype) @ kept
    return base + kept @ inputs.vectors.T.to(kept.dtype)


def _share_of(kept: Tensor, rotated: Tensor, weights: Tensor) -> float:
    return share(_sum(kept.square() * weights), _sum(rotated.square() * weights))


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
