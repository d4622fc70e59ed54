"""`published`: the routine that Safe Delta's authors released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from deltaguard.methods.method import Layer, Method, Options, PreparedLayer, Strengths

if TYPE_CHECKING:
    from torch import Tensor

    from deltaguard.solvers import Solution


class PublishedOptions(Options):
    """Options of `published`."""

    dampening: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Share of the mean diagonal of H that is added to its diagonal; as released, 0.01.",
    )


class Published(Method):
    """Safe Delta as released: a mask by a threshold, blocks of columns, compensation to their right."""

    name = "published"
    title = "Safe Delta as its authors released it: entries selected block by block of columns"
    reference = "Lu et al., ICML 2025, arXiv:2505.12038, and its code as described in docs/how-it-works.md"
    needs = frozenset({"hessian"})
    options = PublishedOptions
    ladder = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0)

    def strengths(self, options: Options) -> Strengths:  # noqa: ARG002
        """Allow the paper's s, which has no upper end."""
        return Strengths(high=float("inf"))

    def prepare(self, layer: Layer, options: Options) -> PreparedLayer:
        """Take the layer with H: the routine computes nothing that would serve two strengths."""
        assert isinstance(options, PublishedOptions)  # noqa: S101
        assert layer.curvature.hessian is not None, "named in `needs`"  # noqa: S101
        return _PublishedLayer(*layer.weights, layer.curvature.hessian, options.dampening)


@dataclass(frozen=True)
class _PublishedLayer(PreparedLayer):
    aligned: Tensor
    finetuned: Tensor
    hessian: Tensor
    dampening: float

    def at(self, price: float) -> Solution:
        from deltaguard.solvers import published

        return published(self.aligned, self.finetuned, self.hessian, strength=price, dampening=self.dampening)
