"""`greedy`: Safe Delta's selection with exact joint compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from deltaguard.methods.method import Layer, Method, Options, PreparedLayer, Strengths

if TYPE_CHECKING:
    from torch import Tensor

    from deltaguard.solvers import Factor, Solution

DEFAULT_STRENGTH = 0.55
"""Share of the summed safety cost that is spent by default; docs/strength.md says why."""


class GreedyOptions(Options):
    """Options of `greedy`, see `solvers.greedy`."""

    budget: Literal["paper", "fraction"] = Field(
        default="fraction",
        description="How the strength is read: `fraction` of the summed safety cost, or the `paper`'s s.",
    )
    compensation: Literal["joint", "additive", "none"] = Field(
        default="joint", description="What becomes of entries that are not kept: `joint`, `additive`, `none`."
    )


class Greedy(Method):
    """The changes that buy most utility for their safety cost, up to a budget."""

    name = "greedy"
    title = "Safe Delta: the changes that buy most utility for their cost"
    reference = "Lu et al., ICML 2025, arXiv:2505.12038"
    needs = frozenset({"factor"})
    options = GreedyOptions
    ladder = (0.2, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)

    def strengths(self, options: Options) -> Strengths:
        """Allow a share, which has a default, or the paper's s, which has none and no upper end."""
        assert isinstance(options, GreedyOptions)  # noqa: S101
        if options.budget == "paper":
            return Strengths(high=float("inf"))
        return Strengths(default=DEFAULT_STRENGTH)

    def prepare(self, layer: Layer, options: Options) -> PreparedLayer:
        """Take the layer with the factor of its damped H, which is computed once per aligned model."""
        assert isinstance(options, GreedyOptions)  # noqa: S101
        assert layer.curvature.factor is not None, "named in `needs`"  # noqa: S101
        return _GreedyLayer(*layer.weights, layer.curvature.factor, options)


@dataclass(frozen=True)
class _GreedyLayer(PreparedLayer):
    aligned: Tensor
    finetuned: Tensor
    factor: Factor
    options: GreedyOptions

    def at(self, price: float) -> Solution:
        from deltaguard.solvers import greedy_factored

        return greedy_factored(
            self.aligned, self.finetuned, self.factor, strength=price, **self.options.model_dump()
        )
