"""Restored deltas that are orthogonal to one matrix: what they may not change to first order, stays.

The closed form bounds a quadratic loss, which a small delta in one direction hardly feels. A share of answers
feels it at first order: a delta that makes every prompt a little more like one that is refused costs next to
no divergence, and moves refusals of all of them the same way. With A the gradient of what is to stay,
‖A‖ = 1, the nearest delta that leaves it where it is, is Δ'' = Δ' - ⟨A, Δ'⟩ A.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaguard.solvers.low_rank import LowRank
from deltaguard.solvers.profile import Directions
from deltaguard.solvers.spectrum import Spectrum
from deltaguard.solvers.thin import project_thin


@dataclass(frozen=True)
class Level:
    """A matrix A of norm 1 seen in the eigenbases of a layer's curvature, beside a delta Δ.

    Attributes:
        up: A is up @ down: (out, r).
        down: (r, in).
        products: of the parts of A and Δ in each of the directions of Δ, as `Directions` lists them,
            (directions,), float64.
        squares: of the parts of A, likewise.
    """

    up: Tensor
    down: Tensor
    products: Tensor
    squares: Tensor

    def along(self, found: Directions, mu: float) -> float:
        """Compute ⟨A, Δ'⟩, which is taken out: at a price of 0, which leaves the delta as it is, nothing.

        Args:
            found: Δ's directions.
            mu: the price of safety.
        """
        return float((self.products * found.kept(mu)).sum()) if mu else 0.0

    def out_of(self, found: LowRank, directions: int | None = None) -> LowRank:
        """Take what lies along A out of a delta that is held as a product, with some directions more.

        Args:
            found: the delta. Where it is cut off to a rank, this comes again after the cut, which would lose
                so small a part.
            directions: how many of the first of A, which hold most of it; all, which give the nearest delta,
                where absent.
        """
        along = float(((self.up.T @ found.up) * (self.down @ found.down.T)).sum())
        up, down = self.up[:, :directions], self.down[:directions]
        of_first = float(((self.up.T @ up) * (self.down @ down.T)).sum())
        # Half in each factor, so that neither leaves the range of half precision.
        root = abs(along / of_first) ** 0.5
        up, down = math.copysign(root, -along) * up, root * down
        return replace(found, up=torch.cat([found.up, up], 1), down=torch.cat([found.down, down]))

    def taken(self, found: Directions, mu: float) -> "Taken":
        """Say what taking it out changes of the sums over directions that a price is judged by."""
        kept, along = found.kept(mu), self.along(found, mu)
        # Of (w δ - c a)², with w the share that is kept, what is more than (w δ)².
        more = along * (along * self.squares - 2 * kept * self.products)
        return Taken(
            kept=-along * float(self.products.sum()),
            lost=float((more + 2 * along * self.products).sum()),
            predicted_kl=0.5 * float((found.g * found.h * more).sum()),
            inputs=float((found.h * more).sum()),
        )


@dataclass(frozen=True)
class Taken:
    """What is added to sums over the directions of a restored delta, see `Level.taken`.

    Attributes:
        kept: to ⟨Δ', Δ⟩.
        lost: to ‖Δ' - Δ‖².
        predicted_kl: to ½ tr(G Δ' H Δ'ᵀ).
        inputs: to tr(Δ' H Δ'ᵀ).
    """

    kept: float = 0.0
    lost: float = 0.0
    predicted_kl: float = 0.0
    inputs: float = 0.0


def level(
    matrix: LowRank,
    inputs: Spectrum,
    outputs: Spectrum,
    *,
    seen: Tensor,
    columns: Tensor,
    core: Tensor,
) -> Level | None:
    """See a matrix beside a delta; None of a matrix that is zero.

    Args:
        matrix: A, of any norm.
        inputs: of H, rank r_h.
        outputs: of G, rank r_g.
        seen: Δ downᵀ, (out, r).
        columns: (ΔV)ᵀ up, (r_h, r), with V the kept eigenvectors of H.
        core: UᵀΔV, (r_g, r_h), with U those of G.
    """
    thin = project_thin(matrix.up, matrix.down, inputs, outputs)
    squares = thin.directions.energies
    norm = float(squares.sum()) ** 0.5
    if norm == 0:
        return None
    inside = (thin.left @ thin.right).double() * core.double()
    of_rows = (thin.left.double() * (outputs.vectors.T @ seen)).sum(1) - inside.sum(1)
    of_columns = (thin.right.T.double() * columns).sum(1) - inside.sum(0)
    rest = (matrix.up.double() * seen).sum() - of_rows.sum() - of_columns.sum() - inside.sum()
    products = torch.cat([inside.flatten(), of_rows, of_columns, rest.reshape(1)])
    return Level(matrix.up / norm, matrix.down, products / norm, squares / norm**2)
