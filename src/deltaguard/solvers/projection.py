"""A delta seen in the eigenbases of its layer's curvature, from which every price is solved.

With U and V the kept eigenvectors of G and H, a delta is a sum of four parts: inside both, inside one of
them, and outside both. A price leaves a share of each direction, so that one projection serves all prices.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaguard.solvers.level import Level, level
from deltaguard.solvers.low_rank import LowRank
from deltaguard.solvers.profile import PROHIBITIVE, Directions, directions, shares_of_parts
from deltaguard.solvers.solution import (
    Difference,
    cached_blocks,
    check_matrices,
    row_blocks,
    sum_of_squares,
)
from deltaguard.solvers.spectrum import Spectrum
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

    def along(self, found: LowRank) -> float:
        """Compute ⟨found, Δ⟩, of another delta that is held as a product."""
        total = 0.0
        blocks = _blocks(self.delta)
        space = found.up.new_empty(min(blocks[0].stop, len(found.up)), found.down.shape[1])
        for block in blocks:
            part = _rows_of(self.delta, block, space) @ found.down.T
            total += float((found.up[block] * part).double().sum())
        return total


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
    blocks = _blocks(delta)
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


def _blocks(delta: Tensor | Difference) -> list[slice]:
    return list(row_blocks(delta if isinstance(delta, Tensor) else delta.aligned, least=_LEAST_ROWS))


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
