"""`kfac` and `ridge`: the exact optimum of Safe Delta's goal, from eigenpairs of a layer's curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field

from deltaguard.methods.method import Layer, Options, PricedLayer, PricedMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deltaguard.solvers import (
        LowRank,
        Outcome,
        Profile,
        Projection,
        Solution,
        Spectrum,
        ThinProjection,
    )

_LIMITS = (1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 1e-2, 3e-2)


class KfacOptions(Options):
    """Options of `kfac`."""

    level_refusals: bool = Field(
        default=True,
        description="Whether what a restored layer would change of the share of refusals is taken out of it, "
        "to first order.",
    )


class Kfac(PricedMethod):
    """Δ' + μ G Δ' H = Δ, less what of Δ' lies along the gradient of refusing."""

    name = "kfac"
    title = "the closed form of Safe Delta's goal with both curvatures: each direction shrinks by its price"
    reference = "the optimum of Safe Delta's goal; curvature as in Martens and Grosse 2015, arXiv:1503.05671"
    needs = frozenset({"inputs", "outputs", "leaning"})
    from_products = True
    options = KfacOptions
    ladder = _LIMITS

    def prepare(self, layer: Layer, options: Options) -> _ProjectedLayer:
        """Project the delta on the eigenvectors of H and G."""
        assert isinstance(options, KfacOptions)  # noqa: S101
        inputs, outputs = layer.curvature.inputs, layer.curvature.outputs
        assert inputs is not None and outputs is not None, "named in `needs`"  # noqa: S101, PT018
        leaning = layer.curvature.leaning if options.level_refusals else None
        return _project(layer, inputs, outputs, leaning)


class Ridge(PricedMethod):
    """Δ' = Δ (I + μ ḡ H)⁻¹, with ḡ the mean eigenvalue of G: prices are in nats, as those of `kfac`."""

    name = "ridge"
    title = "the closed form of Safe Delta's goal with the curvature of the inputs"
    reference = "the optimum of Safe Delta's goal with G = I"
    needs = frozenset({"inputs", "output_mean"})
    from_products = True
    ladder = _LIMITS

    def prepare(self, layer: Layer, options: Options) -> _ProjectedLayer:  # noqa: ARG002
        """Project the delta on the eigenvectors of H."""
        from deltaguard.solvers import scaled_identity

        inputs, mean = layer.curvature.inputs, layer.curvature.output_mean
        assert inputs is not None and mean is not None, "named in `needs`"  # noqa: S101, PT018
        rows = (layer.weights[0] if layer.product is None else layer.product[0]).shape[0]
        return _project(layer, inputs, scaled_identity(rows, mean, like=inputs.values))


@dataclass(frozen=True)
class _ProjectedLayer(PricedLayer):
    """A layer and its projection, which holds the weights itself where the delta is their difference."""

    aligned: Tensor | None
    finetuned: Tensor | None
    projection: Projection | ThinProjection

    def at(self, price: float) -> Solution:
        return self._solved(price, None)

    def rounded_at(self, price: float, dtype: torch.dtype) -> Solution:
        return self._solved(price, dtype)

    def _solved(self, price: float, dtype: torch.dtype | None) -> Solution:
        from deltaguard.solvers import Difference, Projection, solve_projected

        aligned, finetuned = self.aligned, self.finetuned
        if isinstance(self.projection, Projection) and isinstance(self.projection.delta, Difference):
            aligned, finetuned = self.projection.delta.aligned, self.projection.delta.finetuned
        assert aligned is not None and finetuned is not None, "read with weights"  # noqa: S101, PT018
        return solve_projected(aligned, finetuned, self.projection, mu=price, dtype=dtype)

    def factors_at(self, price: float, rank: int | None) -> tuple[LowRank, Outcome] | None:
        from deltaguard.solvers import (
            ThinProjection,
            low_rank,
            low_rank_of_factors,
            outcome_of,
            outcome_of_factors,
        )
        from deltaguard.solvers.low_rank import ROUNDING
        from deltaguard.solvers.profile import PROHIBITIVE

        # A rank of 1 has no direction to spare for what a cut would lose.
        projection = replace(self.projection, level=None) if rank == 1 else self.projection
        level = projection.level if 0 < price < PROHIBITIVE else None
        kept = rank - 1 if level is not None and rank is not None else rank
        product = projection.factors(price) if isinstance(projection, ThinProjection) else None
        if product is None:
            found = low_rank(projection.restored(price), rank=kept)
        else:
            if level is not None:
                product = level.out_of(product)
            found = low_rank_of_factors(product.up, product.down, rank=kept)
            projection.directions.check_restored(_norm(found))
        left = len(found.down)
        if level is not None and left < min(len(found.up), found.down.shape[1]) and kept in (None, left):
            found = level.out_of(found, directions=1)
        if found.residual <= ROUNDING:
            return found, outcome_of(projection, price)
        return found, outcome_of_factors(projection, found)

    def profile(self) -> Profile:
        return self.projection.directions.profile()


def _project(
    layer: Layer, inputs: Spectrum, outputs: Spectrum, leaning: LowRank | None = None
) -> _ProjectedLayer:
    from deltaguard.solvers import Difference, project, project_product
    from deltaguard.solvers.solution import check_matrices, is_finite, working_dtype

    if layer.product is None:
        delta = Difference(*layer.weights, working_dtype(*layer.weights))
        return _ProjectedLayer(None, None, project(delta, inputs, outputs, _of(leaning, delta.dtype)))
    if not all(map(is_finite, layer.product)):
        raise ValueError("The adapter's matrices hold entries that are NaN or infinite.")
    if layer.aligned is not None:
        check_matrices(*layer.weights)
    found = project_product(*layer.product, inputs, outputs, _of(leaning, layer.product[0].dtype))
    return _ProjectedLayer(layer.aligned, layer.finetuned, found)


def _of(matrix: LowRank | None, dtype: torch.dtype) -> LowRank | None:
    if matrix is None:
        return None
    return replace(matrix, up=matrix.up.to(dtype), down=matrix.down.to(dtype))


def _norm(found: LowRank) -> float:
    """‖up @ down‖ of factors with orthogonal columns and rows, as `low_rank` gives them."""
    return math.sqrt(float((found.up.double().square().sum(0) * found.down.double().square().sum(1)).sum()))
