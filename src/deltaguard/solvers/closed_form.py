"""The exact optimum of Safe Delta's own goal: keep the delta, bound the safety loss, nothing all-or-nothing.

Minimising ‖Δ' - Δ‖² + μ tr(G Δ' H Δ'ᵀ) gives Δ' + μ G Δ' H = Δ. In the eigenbases of G and H, with
eigenvalues g and h, that is Δ'_ab = Δ_ab / (1 + μ g_a h_b). `kfac` takes both matrices (K-FAC's curvature;
Martens and Grosse 2015, arXiv:1503.05671), `ridge` has G = I.
"""

import math

import torch
from torch import Tensor

from deltaguard.solvers.level import Taken
from deltaguard.solvers.low_rank import LowRank
from deltaguard.solvers.profile import PROHIBITIVE
from deltaguard.solvers.projection import Projection, project
from deltaguard.solvers.solution import (
    Difference,
    Outcome,
    Solution,
    check_hessian,
    check_matrices,
    share,
    working_dtype,
)
from deltaguard.solvers.spectrum import Spectrum, scaled_identity, spectrum
from deltaguard.solvers.thin import ThinProjection, project_thin


def ridge(aligned: Tensor, finetuned: Tensor, hessian: Tensor, *, mu: float) -> Solution:
    """Shrink a delta by the inputs of safety conversations: Δ' = Δ (I + μH)⁻¹.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight of the same shape.
        hessian: H, the mean of x xᵀ over the layer's inputs on safety conversations, (in, in).
        mu: price of the safety loss, 0 or more; 0 gives the fine-tuned weight and infinity (from 1e30 on) the
            aligned one, exactly.

    Returns:
        As `kfac`, with G = I.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, H has negative eigenvalues that no rounding
            explains, or `mu` is negative or NaN.

    Example:
        >>> import torch
        >>> ridge(torch.zeros(1, 2), torch.ones(1, 2), torch.diag(torch.tensor([0.0, 1.0])), mu=1.0).weight
        tensor([[1.0000, 0.5000]])
    """
    check_matrices(aligned, finetuned)
    check_hessian(hessian, aligned.shape[1])
    inputs = spectrum(hessian.to(working_dtype(aligned, finetuned, hessian)))
    return closed_form(
        aligned, finetuned, inputs, scaled_identity(aligned.shape[0], 1.0, like=inputs.values), mu=mu
    )


def kfac(
    aligned: Tensor, finetuned: Tensor, hessian: Tensor, output_hessian: Tensor, *, mu: float
) -> Solution:
    """Shrink a delta by the curvature of predictions: Δ' solves Δ' + μ G Δ' H = Δ.

    Args:
        aligned: aligned weight, (out, in).
        finetuned: fine-tuned weight of the same shape.
        hessian: H, as in `ridge`, (in, in).
        output_hessian: G, the sum of g gᵀ over gradients g of log-probabilities with respect to the layer's
            output, divided by the number of response tokens, (out, out).
        mu: as in `ridge`. With it in nats, one value serves all layers.

    Returns:
        The optimum; `kept_energy` falls with `mu`. `detail` holds `safety_kl_share`, tr(G Δ' H Δ'ᵀ) /
        tr(G Δ H Δᵀ), and `predicted_safety_kl`, half of tr(G Δ' H Δ'ᵀ).

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
    dtype = working_dtype(aligned, finetuned, hessian, output_hessian)
    inputs, outputs = spectrum(hessian.to(dtype)), spectrum(output_hessian.to(dtype))
    return closed_form(aligned, finetuned, inputs, outputs, mu=mu)


def closed_form(
    aligned: Tensor, finetuned: Tensor, inputs: Spectrum, outputs: Spectrum, *, mu: float
) -> Solution:
    """Solve `kfac` from eigendecompositions, all or cut off, which serve every fine-tune and every `mu`.

    Args:
        aligned: as in `kfac`, like `finetuned` and `mu`.
        finetuned: the fine-tuned weight.
        inputs: of H.
        outputs: of G; `scaled_identity` gives `ridge`.
        mu: price of the safety loss.

    Raises:
        ValueError: `mu` is negative or NaN, or the spectra are none: negative eigenvalues, eigenvectors that
            are not orthonormal, or a result that is larger than the delta.
    """
    delta = Difference(aligned, finetuned, working_dtype(aligned, finetuned, inputs.values))
    return solve_projected(aligned, finetuned, project(delta, inputs, outputs), mu=mu)


def solve_projected(
    aligned: Tensor,
    finetuned: Tensor,
    projection: Projection | ThinProjection,
    *,
    mu: float,
    dtype: torch.dtype | None = None,
) -> Solution:
    """Solve `closed_form` for a delta that is projected already.

    Args:
        aligned: as in `kfac`, like `finetuned` and `mu`.
        finetuned: the fine-tuned weight.
        projection: of the delta, finetuned - aligned.
        mu: price of the safety loss.
        dtype: what the weight is rounded to; the working precision where absent.

    Raises:
        ValueError: `mu` is negative or NaN, or the result would be larger than the delta.
    """
    outcome = outcome_of(projection, mu)
    if mu == 0:
        weight = finetuned.to(dtype or projection.dtype, copy=True)
    elif mu >= PROHIBITIVE:
        weight = aligned.to(dtype or projection.dtype, copy=True)
    else:
        weight = projection.restored(mu, aligned, dtype=dtype)
    return Solution(weight=weight, **vars(outcome))


def outcome_of(projection: Projection | ThinProjection, mu: float) -> Outcome:
    """Compute what `solve_projected` keeps at a price, and its cost, without the weight.

    Raises:
        ValueError: `mu` is negative or NaN.
    """
    if not mu >= 0:
        raise ValueError(f"mu is {mu}; it must be 0 or more.")
    spread, taken = projection.directions.profile(), Taken()
    if projection.level is not None:
        taken = projection.level.taken(projection.directions, mu)
    predicted = spread.predicted_kl(mu) + taken.predicted_kl
    return Outcome(
        kept_energy=share(spread.kept(mu) + taken.kept, spread.energy),
        safety_cost=projection.directions.safety_cost(mu, taken.inputs),
        utility_loss=share(spread.lost(mu) + taken.lost, spread.energy),
        detail={
            "delta_norm": math.sqrt(spread.energy),
            "safety_kl_share": share(predicted, spread.predicted_kl(0)),
            "predicted_safety_kl": predicted,
        },
    )


def outcome_of_factors(projection: Projection | ThinProjection, found: LowRank) -> Outcome:
    """Compute what a product in the place of the restored delta keeps, and its cost.

    Args:
        projection: of the delta, Δ.
        found: what is written, such as Δ' cut off to a rank.

    Returns:
        As `solve_projected`, with the product for Δ'.
    """
    whole, spread = projection.directions, projection.directions.profile()
    own = project_thin(found.up, found.down, projection.inputs, projection.outputs).directions
    kept, predicted = projection.along(found), 0.5 * float((own.g * own.h * own.energies).sum())
    lost = spread.energy - 2 * kept + float(own.energies.sum())
    return Outcome(
        kept_energy=share(kept, spread.energy),
        safety_cost=share(float((own.h * own.energies).sum()), float((whole.h * whole.energies).sum())),
        utility_loss=share(max(lost, 0.0), spread.energy),
        detail={
            "delta_norm": math.sqrt(spread.energy),
            "safety_kl_share": share(predicted, spread.predicted_kl(0)),
            "predicted_safety_kl": predicted,
        },
    )
