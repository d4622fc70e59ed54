"""Layers that see the same input, and what is summed over the tokens that pass them.

Raw sums and token counts are kept until the end, so that runs merge by addition.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from deltaguard.errors import DeltaguardError

_Size = Annotated[int, Field(gt=0, le=1 << 31)]


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer.

    Attributes:
        tensor: its weight's name in the aligned checkpoint.
        transposed: whether the weight is stored (in, out), as GPT-2's Conv1D is, not (out, in).
        out_features: size of the output, and of G.
    """

    tensor: str
    transposed: bool
    out_features: _Size

    @property
    def name(self) -> str:
        """The layer's name in the aligned checkpoint, without `.weight`."""
        return self.tensor.removesuffix(".weight")


@dataclass(frozen=True)
class LayerGroup:
    """Layers that see the same input, and so share one H.

    Attributes:
        name: the first layer's name.
        in_features: size of the input, and of H.
        tokens: how many tokens H was summed over.
        layers: the layers, in the model's order.
    """

    name: str
    in_features: _Size
    tokens: Annotated[int, Field(gt=0, le=1 << 62)]
    layers: Annotated[tuple[LinearLayer, ...], Field(min_length=1)]

    def matrices(self) -> list[tuple[str, int]]:
        """List H and the G of each layer: what their tensors' names begin with, and their size."""
        outputs = [(output_name(layer), layer.out_features) for layer in self.layers]
        return [(input_name(self.name), self.in_features), *outputs]


def input_name(group: str) -> str:
    """Name the H of a group."""
    return f"{group}.input"


def output_name(layer: LinearLayer) -> str:
    """Name the G of a layer."""
    return f"{layer.name}.output"


@dataclass(frozen=True)
class Moment:
    """A raw sum over tokens.

    Attributes:
        total: Σ x xᵀ, (in, in).
        tokens: how many x were summed.
    """

    total: Tensor
    tokens: int


@dataclass(frozen=True)
class Sums:
    """What calibration summed for one group.

    Attributes:
        inputs: Σ x xᵀ over all tokens.
        outputs: Σ g gᵀ over all tokens, (out, out), of each layer.
    """

    inputs: Moment
    outputs: tuple[Tensor, ...]


def take_sums(group: LayerGroup, sums: MutableMapping[str, Moment]) -> Sums:
    """Take one group's sums out of those of all (see `LayerGroup.matrices`), so that memory gets free."""
    outputs = tuple(sums.pop(output_name(layer)).total for layer in group.layers)
    return Sums(sums.pop(input_name(group.name)), outputs)


def empty_moment(
    size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Moment:
    """Make the sum over no tokens, (size, size)."""
    return Moment(torch.zeros(size, size, dtype=dtype, device=device), 0)


def accumulate(moment: Moment, inputs: Tensor) -> Moment:
    """Add a batch of tokens; the moment given is left as it was.

    Args:
        moment: what was summed so far.
        inputs: (tokens, in), in any dtype; the products are taken in the moment's dtype.

    Example:
        >>> import torch
        >>> accumulate(empty_moment(2), torch.tensor([[1.0, 2.0]])).total.tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    x = inputs.to(moment.total)
    return Moment(torch.addmm(moment.total, x.T, x), moment.tokens + x.shape[0])


def merge(moments: Sequence[Moment]) -> Moment:
    """Add the sums and the counts of at least one moment."""
    total = moments[0].total.clone()
    for moment in moments[1:]:
        total += moment.total
    return Moment(total, sum(moment.tokens for moment in moments))


def normalise(moment: Moment) -> Tensor:
    """Compute H, the mean of x xᵀ, (in, in): exactly symmetric, from the upper triangle of the sum."""
    upper = moment.total.triu()
    return (upper + upper.triu(1).T) / moment.tokens


def check_sum(name: str, total: Tensor, what: str) -> None:
    """Refuse a sum that nothing can be learned from.

    Args:
        name: of the group or layer, for the messages.
        total: the sum.
        what: it was summed over, `inputs` or `gradients`.

    Raises:
        DeltaguardError: an entry is not finite, or the sum is zero.
    """
    bad = int(total.numel() - total.isfinite().sum())
    if bad:
        raise DeltaguardError(
            f"The curvature of `{name}` holds {bad} entries that are NaN or infinite: the aligned model's "
            f"{what} overflow there. Calibrate in float32 or bfloat16."
        )
    if not bool(total.any()):
        raise DeltaguardError(
            f"The curvature of `{name}` is zero: its {what} are all zero, or too small for the dtype, so "
            "nothing can be said about its safety. Calibrate in float32."
        )
