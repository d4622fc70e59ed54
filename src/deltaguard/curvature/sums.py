"""Layers that see the same input, and what is summed over the tokens that pass them.

Raw sums and token counts are kept until the end, so that runs merge by addition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from deltaguard.device import enough_memory
from deltaguard.errors import DeltaguardError
from deltaguard.ranks import Ranks

_Size = Annotated[int, Field(gt=0, le=1 << 31)]

_PANEL = 256
"""Rows; fewer make products slower, and more compute more than half of a sum."""


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer.

    Attributes:
        tensor: its weight's name in the aligned checkpoint.
        transposed: whether the weight is stored (in, out), as GPT-2's Conv1D is, not (out, in).
        out_features: size of the output, and of G.
        expert: which matrix of a tensor that stacks those of experts; None where the tensor is the weight.
    """

    tensor: str
    transposed: bool
    out_features: _Size
    expert: Annotated[int, Field(ge=0)] | None = None

    @property
    def key(self) -> str:
        """The name of its weight in the aligned checkpoint; in a stack, with its number."""
        return self.tensor if self.expert is None else f"{self.tensor}.{self.expert}"

    @property
    def name(self) -> str:
        """The layer's name in the aligned checkpoint: its key, without `.weight`."""
        return self.key.removesuffix(".weight")


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
class Reached:
    """How much the curvature of an expert's layers rests on the tokens that were routed to it.

    Attributes:
        tokens: how many those were.
        pooled: share of H, and of each layer's G, that is of all experts of the block (see `routed`).
    """

    tokens: Annotated[int, Field(ge=0, le=1 << 62)]
    pooled: tuple[Annotated[float, Field(ge=0, le=1)], ...]


@dataclass(frozen=True)
class Sums:
    """What calibration summed for one group.

    Attributes:
        inputs: Σ x xᵀ over all tokens.
        outputs: Σ g gᵀ over all tokens, (out, out), of each layer.
        reached: of an expert's layers, what their sums rest on; None of layers that see every token.
    """

    inputs: Moment
    outputs: tuple[Tensor, ...]
    reached: Reached | None = None


class RunningMoment:
    """A sum of x xᵀ over tokens, in place.

    Of the symmetric sum a little more than half is computed: panels of rows, each from the diagonal on.

    Example:
        >>> import torch
        >>> running = RunningMoment(2)
        >>> running.add(torch.tensor([[1.0, 2.0]]))
        >>> running.taken().total.tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, size: int, *, device: torch.device | str = "cpu") -> None:
        """Begin with no token; the sum is (size, size), in float32."""
        self._total = torch.zeros(size, size, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add a batch of tokens.

        Args:
            inputs: (tokens, size), in any dtype; the products are taken in the sum's.

        Raises:
            torch.OutOfMemoryError: memory does not suffice; nothing was added.
            DeltaguardError: it did not suffice when a part had been added.
        """
        x = inputs.to(self._total)
        # No memory is taken here but by libraries, once.
        with enough_memory("take smaller batches, or another device"):
            for start in range(0, len(self._total), _PANEL):
                rows = x[:, start : start + _PANEL]
                self._total[start : start + _PANEL, start:].addmm_(rows.T, x[:, start:])
        self._tokens += len(x)

    def add_up(self, ranks: Ranks, owner: int | None = None) -> None:
        """Add what all ranks summed: on the owner, and the others' sum is of no use then; or on all."""
        ranks.add_up(self._total, owner)
        self._tokens = sum(ranks.from_all(self._tokens))

    def taken(self) -> Moment:
        """Give the sum, exactly symmetric; nothing may be added to it then."""
        total = self._total
        for start in range(0, len(total), _PANEL):
            end = start + _PANEL
            diagonal = total[start:end, start:end]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
            total[end:, start:end] = total[start:end, end:].T
        return Moment(total, self._tokens)


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
