"""The exact optimum of Safe Delta's own goal: keep the delta, bound the safety loss, nothing all-or-nothing.

Minimising ‖Δ' - Δ‖² + μ tr(G Δ' H Δ'ᵀ) gives Δ' + μ G Δ' H = Δ. In the eigenbases of G and H, with
eigenvalues g and h, that is Δ'_ab = Δ_ab / (1 + μ g_a h_b). `kfac` takes both matrices (K-FAC's curvature;
Martens and Grosse 2015, arXiv:1503.05671), `ridge` has G = I.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaguard.solvers.level import Level, Taken, level
from deltaguard.solvers.low_rank import LowRank
from deltaguard.solvers.profile import PROHIBITIVE, Directions, directions, shares_of_parts
from deltaguard.solvers.solution import (
    Difference,
    Outcome,
    Solution,
    cached_blocks,
    check_hessian,
    check_matrices,
    row_blocks,
    share,
    sum_of_squares,
    working_dtype,
)
from deltaguard.solvers.spectrum import Spectrum, scaled_identity, spectrum
from deltaguard.solvers.thin import ThinProjection, project_thin

_LEAST_ROWS = 1024
"""Of a block: with fewer, products spend their time on adding up."""


@dataclass(frozen=True)
class Projection:
    """A delta seen in the eigenbases of its layer's curvature: made once, it serves every μ.

    With U and V the kept eigenvectors of G and H, everything is a sum of four parts: inside both, inside one
    of them, and outside both.

    Attributes:
        delta: Δ, (out, in), or what gives its rows.
        inputs: of H, rank r_h, in the precision it was given in.
        outputs: of G, rank r_g, likewise.
        rows: UᵀΔ, (r_g, in).
        columns: ΔV, (out, r_h).
        core: UᵀΔV, (r_g, r_h).
        directions: the delta by prices.
        level: what the restored delta is orthogonal to.
    """

    delta: Tensor | Difference
    inputs: Spectrum
    outputs: Spectrum
    rows: Tensor
    columns: Tensor
    core: Tensor
    directions: Directions
    level: Level | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which everything is computed."""
        return self.delta.dtype

    def restored(self, mu: float, onto: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Compute Δ', (out, in).

        Args:
            mu: the price of safety.
            onto: a matrix that it is added to, (out, in), which stays as it is.
            dtype: what the result is rounded to; as it is computed where absent.

        Raises:
            ValueError: it would be larger than Δ, see `Directions.check_restored`.
        """
        if mu >= PROHIBITIVE:
            if onto is not None:
                return onto.to(dtype or self.dtype, copy=True)
            return self.columns.new_zeros(len(self.columns), self.rows.shape[1], dtype=dtype)
        parts = _Parts(self.rows, self.columns, self.core)
        spectra = self.inputs.to(self.dtype), self.outputs.to(self.dtype)
        less = None
        if self.level is not None:
            less = LowRank(self.level.down, self.level.up * self.level.along(self.directions, mu), 0.0)
        found, squares = _shrunk(self.delta, parts, *spectra, mu, onto, dtype or self.dtype, less=less)
        self.directions.check_restored(math.sqrt(float(squares)))
        return found


def project(
    delta: Tensor | Difference, inputs: Spectrum, outputs: Spectrum, orthogonal_to: LowRank | None = None
) -> Projection:
    """Project a delta, (out, in), on the eigenvectors of H and G.

    Args:
        delta: Δ, or what gives its rows.
        inputs: of H.
        outputs: of G.
        orthogonal_to: a matrix of the delta's shape that every restored delta is orthogonal to (see `level`).

    Raises:
        ValueError: eigenvalues are negative or no numbers, eigenvectors not orthonormal, or weights of which
            it is the difference not finite.
    """
    own = inputs.to(delta.dtype), outputs.to(delta.dtype)
    parts, squares, seen = _parts(delta, *own, None if orthogonal_to is None else orthogonal_to.down)
    if isinstance(delta, Difference) and not bool(squares.isfinite()):
        check_matrices(delta.aligned, delta.finetuned)
    norms = _norms(parts.rows.T), _norms(parts.columns), squares
    found = directions(parts.core, *norms, *own)
    levelled = None
    if orthogonal_to is not None:
        columns = parts.columns.T @ orthogonal_to.up
        levelled = level(orthogonal_to, *own, seen=seen, columns=columns, core=parts.core)
    return Projection(delta, inputs, outputs, parts.rows, parts.columns, parts.core, found, levelled)


def project_product(
    up: Tensor, down: Tensor, inputs: Spectrum, outputs: Spectrum, orthogonal_to: LowRank | None = None
) -> ThinProjection:
    """Project a delta up @ down on the eigenvectors of H and G, as `project` does with the whole of it.

    Args:
        up: (out, r).
        down: (r, in).
        inputs: of H.
        outputs: of G.
        orthogonal_to: as in `project`.

    Raises:
        ValueError: as `project_thin`.
    """
    found = project_thin(up, down, inputs, outputs)
    if orthogonal_to is None:
        return found
    levelled = level(
        orthogonal_to,
        found.inputs,
        found.outputs,
        seen=up @ (down @ orthogonal_to.down.T),
        columns=found.right.T @ (up.T @ orthogonal_to.up),
        core=found.left @ found.right,
    )
    return replace(found, level=levelled)


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
    parts, _, _ = _parts(matrix, inputs, outputs)
    return _shrunk(matrix, parts, inputs, outputs, mu, None, matrix.dtype)[0]


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
    kept, predicted = _along(projection, found), 0.5 * float((own.g * own.h * own.energies).sum())
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


def _along(projection: Projection | ThinProjection, found: LowRank) -> float:
    """Compute ⟨found, Δ⟩."""
    if isinstance(projection, ThinProjection):
        return float(((projection.up.T @ found.up) * (projection.down @ found.down.T)).double().sum())
    delta, total = projection.delta, 0.0
    blocks = list(row_blocks(delta if isinstance(delta, Tensor) else delta.aligned, least=_LEAST_ROWS))
    space = found.up.new_empty(min(blocks[0].stop, len(found.up)), found.down.shape[1])
    for block in blocks:
        total += float((found.up[block] * (_rows_of(delta, block, space) @ found.down.T)).double().sum())
    return total


@dataclass(frozen=True)
class _Parts:
    """UᵀΔ, ΔV and UᵀΔV, see `Projection`."""

    rows: Tensor
    columns: Tensor
    core: Tensor


def _parts(
    delta: Tensor | Difference, inputs: Spectrum, outputs: Spectrum, down: Tensor | None = None
) -> tuple[_Parts, Tensor, Tensor]:
    """Project a delta, square its norm, and multiply it with the transpose of a matrix (r, in)."""
    u, v = outputs.vectors, inputs.vectors
    # One product for both: with a few columns alone it would take as long as reading the delta.
    right = v if down is None else torch.cat([v, down.T], 1)
    rows, seen = v.new_zeros(u.shape[1], len(v)), v.new_empty(len(u), right.shape[1])
    squares = v.new_zeros((), dtype=torch.float64)
    blocks = list(row_blocks(delta if isinstance(delta, Tensor) else delta.aligned, least=_LEAST_ROWS))
    space = v.new_empty(min(blocks[0].stop, len(u)), len(v))
    for block in blocks:
        part = _rows_of(delta, block, space)
        rows.addmm_(u[block].T, part)
        torch.mm(part, right, out=seen[block])
        squares += sum_of_squares(part)
    columns = seen[:, : v.shape[1]].contiguous()
    return _Parts(rows, columns, rows @ v), squares, seen[:, v.shape[1] :]


def _shrunk(
    delta: Tensor | Difference,
    parts: _Parts,
    inputs: Spectrum,
    outputs: Spectrum,
    mu: float,
    onto: Tensor | None,
    dtype: torch.dtype,
    *,
    less: LowRank | None = None,
) -> tuple[Tensor, Tensor]:
    """Add up the four parts of a delta, each with its share, less a product, and what they are put onto.

    Returns:
        The sum, rounded to `dtype`; and the squared norm of the parts alone.
    """
    both, of_rows, of_columns, of_all = shares_of_parts(inputs, outputs, mu)
    vt = inputs.vectors.T
    left = [outputs.vectors, parts.columns * of_columns]
    right = [torch.addmm(parts.rows * of_rows[:, None], parts.core * both, vt), vt]
    if less is not None:
        left.append(-less.up)
        right.append(less.down)
    # One product for all: each would read and write the whole of what it is added to.
    up, down = torch.cat(left, 1), torch.cat(right)
    found = up.new_empty(len(up), down.shape[1], dtype=dtype)
    squares = up.new_zeros((), dtype=torch.float64)
    blocks = list(row_blocks(found, least=_LEAST_ROWS))
    space = up.new_empty(min(blocks[0].stop, len(found)), found.shape[1])
    for block in blocks:
        part = _rows_of(delta, block, space).addmm_(up[block], down, beta=of_all)
        squares += sum_of_squares(part)
        for piece in cached_blocks(part):
            if onto is not None:
                part[piece].add_(onto[block][piece].to(delta.dtype))
            found[block][piece].copy_(part[piece])
    return found, squares


def _rows_of(delta: Tensor | Difference, rows: slice, space: Tensor) -> Tensor:
    """Compute rows of a delta, or copy them, into memory that is used again for the next ones."""
    if isinstance(delta, Difference):
        target = space[: len(delta.aligned[rows])]
        delta.into(target, rows)
        return target
    return space[: len(delta[rows])].copy_(delta[rows])


def _norms(matrix: Tensor) -> Tensor:
    """Square the norms of columns, in float64."""
    return torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64).square()
