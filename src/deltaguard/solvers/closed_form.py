"""The exact optimum of Safe Delta's own goal: keep the delta, bound the safety loss, nothing all-or-nothing.

Minimising ‖Δ' - Δ‖² + μ tr(G Δ' H Δ'ᵀ) gives Δ' + μ G Δ' H = Δ. In the eigenbases of G and H, with
eigenvalues g and h, that is Δ'_ab = Δ_ab / (1 + μ g_a h_b). `kfac` takes both matrices (K-FAC's curvature;
Martens and Grosse 2015, arXiv:1503.05671), `ridge` has G = I.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.solvers.profile import PROHIBITIVE, Directions, directions, shares_of_parts
from deltaguard.solvers.solution import (
    Outcome,
    Solution,
    check_hessian,
    check_matrices,
    share,
    squared_norm,
    working_dtype,
)
from deltaguard.solvers.spectrum import Spectrum, scaled_identity, spectrum
from deltaguard.solvers.thin import ThinProjection


@dataclass(frozen=True)
class Projection:
    """A delta seen in the eigenbases of its layer's curvature: made once, it serves every μ.

    With U and V the kept eigenvectors of G and H, everything is a sum of four parts: inside both, inside one
    of them, and outside both.

    Attributes:
        delta: Δ, (out, in).
        inputs: of H, rank r_h.
        outputs: of G, rank r_g.
        rows: UᵀΔ, (r_g, in).
        columns: ΔV, (out, r_h).
        core: UᵀΔV, (r_g, r_h).
        directions: the delta by prices.
    """

    delta: Tensor
    inputs: Spectrum
    outputs: Spectrum
    rows: Tensor
    columns: Tensor
    core: Tensor
    directions: Directions

    @property
    def dtype(self) -> torch.dtype:
        """In which everything is computed."""
        return self.delta.dtype

    def restored(self, mu: float) -> Tensor:
        """Compute Δ', (out, in).

        Raises:
            ValueError: it would be larger than Δ, see `Directions.check_restored`.
        """
        if mu >= PROHIBITIVE:
            return torch.zeros_like(self.delta)
        parts = self.delta, self.rows, self.columns, self.core
        found = _shrunk(*parts, self.inputs.to(self.dtype), self.outputs.to(self.dtype), mu)
        self.directions.check_restored(math.sqrt(squared_norm(found)))
        return found


def project(delta: Tensor, inputs: Spectrum, outputs: Spectrum) -> Projection:
    """Project a delta, (out, in), on the eigenvectors of H and G.

    Raises:
        ValueError: eigenvalues are negative or no numbers, or eigenvectors not orthonormal.
    """
    inputs, outputs = inputs.to(delta.dtype), outputs.to(delta.dtype)
    rows, columns = outputs.vectors.T @ delta, delta @ inputs.vectors
    core = rows @ inputs.vectors
    norms = _norms(rows.T), _norms(columns), _norms(delta).sum()
    return Projection(delta, inputs, outputs, rows, columns, core, directions(core, *norms, inputs, outputs))


def shrink(matrix: Tensor, inputs: Spectrum, outputs: Spectrum, *, mu: float) -> Tensor:
    """Solve X + μ G X H = M, as for a delta, for any matrix M, (out, in): X = (I + μ G ⊗ H)⁻¹ M.

    Of a gradient it makes μ⁻¹ times the step of natural gradient descent in K-FAC's metric G ⊗ H, damped by
    1/μ: directions that matter to what the aligned model predicts move little.

    Args:
        matrix: M.
        inputs: of H.
        outputs: of G.
        mu: 0 or more.

    Example:
        >>> import torch
        >>> one = scaled_identity(1, 1.0, like=torch.ones(1))
        >>> shrink(torch.ones(1, 1), one, one, mu=3.0)
        tensor([[0.2500]])
    """
    inputs, outputs = inputs.to(matrix.dtype), outputs.to(matrix.dtype)
    rows, columns = outputs.vectors.T @ matrix, matrix @ inputs.vectors
    return _shrunk(matrix, rows, columns, rows @ inputs.vectors, inputs, outputs, mu)


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
    dtype = working_dtype(aligned, finetuned, inputs.values)
    base, target = aligned.to(dtype), finetuned.to(dtype)
    return solve_projected(base, target, project(target - base, inputs, outputs), mu=mu)


def solve_projected(
    aligned: Tensor, finetuned: Tensor, projection: Projection | ThinProjection, *, mu: float
) -> Solution:
    """Solve `closed_form` for a delta that is projected already.

    Args:
        aligned: as in `kfac`, like `finetuned` and `mu`.
        finetuned: the fine-tuned weight.
        projection: of the delta, finetuned - aligned.
        mu: price of the safety loss.

    Raises:
        ValueError: `mu` is negative or NaN, or the result would be larger than the delta.
    """
    outcome = outcome_of(projection, mu)
    if mu == 0:
        weight = finetuned.to(projection.dtype, copy=True)
    elif mu >= PROHIBITIVE:
        weight = aligned.to(projection.dtype, copy=True)
    else:
        weight = projection.restored(mu).add_(aligned.to(projection.dtype))
    return Solution(weight=weight, **vars(outcome))


def outcome_of(projection: Projection | ThinProjection, mu: float) -> Outcome:
    """Compute what `solve_projected` keeps at a price, and its cost, without the weight.

    Raises:
        ValueError: `mu` is negative or NaN.
    """
    if not mu >= 0:
        raise ValueError(f"mu is {mu}; it must be 0 or more.")
    spread = projection.directions.profile()
    return Outcome(
        kept_energy=share(spread.kept(mu), spread.energy),
        safety_cost=projection.directions.safety_cost(mu),
        utility_loss=share(spread.lost(mu), spread.energy),
        detail={
            "delta_norm": math.sqrt(spread.energy),
            "safety_kl_share": share(spread.predicted_kl(mu), spread.predicted_kl(0)),
            "predicted_safety_kl": spread.predicted_kl(mu),
        },
    )


def _shrunk(
    matrix: Tensor,
    rows: Tensor,
    columns: Tensor,
    core: Tensor,
    inputs: Spectrum,
    outputs: Spectrum,
    mu: float,
) -> Tensor:
    """Add up the four parts of a matrix, each with its share."""
    both, of_rows, of_columns, of_all = shares_of_parts(inputs, outputs, mu)
    inner = torch.addmm(rows * of_rows[:, None], core * both, inputs.vectors.T)
    found = torch.addmm(matrix * of_all, outputs.vectors, inner)
    return found.addmm_(columns * of_columns, inputs.vectors.T)


def _norms(matrix: Tensor) -> Tensor:
    """Square the norms of columns, in float64."""
    return torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64).square()
