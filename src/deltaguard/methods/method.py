"""What a method is: what it needs to know, how its strength is read, and what it makes of one layer.

Files of methods import torch and the solvers inside `prepare`: the command line reads all methods, for its
help and its errors, before anything is run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from deltaguard.solvers import Factor, LowRank, Outcome, Profile, Solution, Spectrum

Role = Literal["unaligned", "pretrained", "safe"]
"""A further model that a method compares with."""

ROLES: Mapping[Role, str] = {
    "unaligned": "the aligned model after fine-tuning on harmful data, or an adapter over it",
    "pretrained": "the model before its alignment",
    "safe": "the aligned model after fine-tuning on safety data, or an adapter over it",
}
"""What each further model is, in words for help and errors."""

Quantity = Literal["inputs", "outputs", "output_mean", "hessian", "factor", "leaning"]
"""What a store knows of a layer, by the fields of `Curvature`."""


class Options(BaseModel):
    """A method's own options: a subclass declares each with a type, a default and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Strengths:
    """The strengths that a method can be given; a larger one keeps more of the fine-tune.

    Attributes:
        low: the smallest.
        high: the largest.
        default: taken where none is given; None where the user must choose.
    """

    low: float = 0.0
    high: float = 1.0
    default: float | None = None


@dataclass(frozen=True)
class Curvature:
    """What a method asked to know of a layer's curvature; what it did not ask for is None.

    Attributes:
        inputs: eigenpairs of H, the mean of x xᵀ over the layer's inputs x on safety conversations, (in, in).
        outputs: eigenpairs of G, that of g gᵀ over gradients g at its outputs, (out, out).
        output_mean: mean eigenvalue of G.
        hessian: H itself.
        factor: the factor of the damped H.
        leaning: the gradient of how much the aligned model leans towards refusing, of low rank; None as well
            where the store does not know it.
    """

    inputs: Spectrum | None = None
    outputs: Spectrum | None = None
    output_mean: float | None = None
    hessian: Tensor | None = None
    factor: Factor | None = None
    leaning: LowRank | None = None


@dataclass(frozen=True)
class Layer:
    """One weight as each model has it, a matrix (out, in).

    Attributes:
        aligned: the aligned model's; None where a method with `from_products` restores an adapter to an
            adapter, which takes no weight.
        finetuned: the fine-tuned model's; likewise.
        product: for such a method the delta as B, (out, r), and A, (r, in), where an adapter holds it so.
        others: of the further models that the method names.
        curvature: of the layer.
    """

    aligned: Tensor | None
    finetuned: Tensor | None
    product: tuple[Tensor, Tensor] | None = None
    others: Mapping[Role, Tensor] = field(default_factory=dict["Role", "Tensor"])
    curvature: Curvature = Curvature()

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The aligned and the fine-tuned weight of a layer that has both."""
        assert self.aligned is not None, "a method with `from_products` asks first"  # noqa: S101
        assert self.finetuned is not None, "a method with `from_products` asks first"  # noqa: S101
        return self.aligned, self.finetuned


class PreparedLayer(ABC):
    """A layer about which everything is computed that does not depend on the price; it serves every price.

    A dataclass of tensors: `restoration.trial` keeps it in memory or in a file between prices.
    """

    @abstractmethod
    def at(self, price: float) -> Solution:
        """Restore the layer.

        Args:
            price: the strength, of which a larger one keeps more; for a `PricedLayer` the price of safety μ,
                of which a larger one keeps less.

        Returns:
            The solution; its `detail` holds `delta_norm`, ‖Δ‖.

        Raises:
            ValueError: a number is out of range, or the result is not what the method promises.
        """

    def rounded_at(self, price: float, dtype: torch.dtype) -> Solution:
        """Restore the layer with its weight in the precision in which it is written, rounded once.

        A method overrides this that need not have all of the weight in the working precision for it.

        Args:
            price: as in `at`.
            dtype: of the weight.
        """
        solution = self.at(price)
        return replace(solution, weight=solution.weight.to(dtype))

    def factors_at(self, price: float, rank: int | None) -> tuple[LowRank, Outcome] | None:  # noqa: ARG002
        """Restore the delta as factors of an adapter, without the weights; None where that takes these.

        Args:
            price: as in `at`.
            rank: of the factors, as in `solvers.low_rank`.
        """
        return None


class PricedLayer(PreparedLayer):
    """A layer of a method that has one price of safety, μ, for all layers: 0 keeps everything."""

    @abstractmethod
    def profile(self) -> Profile:
        """Say how the delta is spread over prices, which tells what a price keeps and costs."""


class Method(ABC):
    """A way to restore a fine-tune: a subclass in a file of its own, and one entry in `methods.METHODS`.

    Attributes:
        name: what `--method` takes.
        title: one line for help, cards and tables.
        reference: where it comes from.
        needs: what it must know of a layer's curvature.
        models: further models that it needs.
        everywhere: whether it decides every tensor, or the linear layers of the decoder blocks only.
        from_products: whether its layers can give `factors_at` from a delta that an adapter holds as a
            product, without the two weights.
        without_delta: whether it may change a layer, too, that fine-tuning left as it was.
        options: its own options.
        ladder: the seven strengths that a bench measures, rising; of a priced method limits of safety KL.
            Without any it restores, and is not benched.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    needs: ClassVar[frozenset[Quantity]] = frozenset()
    models: ClassVar[tuple[Role, ...]] = ()
    everywhere: ClassVar[bool] = False
    from_products: ClassVar[bool] = False
    without_delta: ClassVar[bool] = False
    options: ClassVar[type[Options]] = Options
    ladder: ClassVar[tuple[float, ...]] = ()

    def strengths(self, options: Options) -> Strengths:  # noqa: ARG002
        """Say which strengths may be given with these options."""
        return Strengths()

    @abstractmethod
    def prepare(self, layer: Layer, options: Options) -> PreparedLayer:
        """Compute what does not depend on the price.

        Raises:
            ValueError: the weights or the curvature cannot be used; the message need not name the layer.
        """


class PricedMethod(Method):
    """A method whose layers share one price of safety, so that the dial can search for it.

    Its strength is the share of the delta's predicted safety KL that is kept.
    """

    @abstractmethod
    def prepare(self, layer: Layer, options: Options) -> PricedLayer:
        """Compute what does not depend on the price, as `Method.prepare`."""
