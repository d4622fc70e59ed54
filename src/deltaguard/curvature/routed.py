"""What is summed over the tokens that are routed to one expert, and what its curvature is taken to be.

An expert that few tokens reach says little of its own curvature, and one that none reaches says nothing,
which must not mean that it costs nothing. So each is shrunk towards that of all experts of its block.
"""

from collections.abc import MutableMapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from deltaguard.curvature.sums import (
    LayerGroup,
    Moment,
    Reached,
    RunningMoment,
    Sums,
    input_name,
    output_name,
)


class Pool:
    """The sum over all experts of a block.

    Attributes:
        experts: how many there are.
    """

    def __init__(self, size: int, experts: int, device: torch.device | str = "cpu") -> None:
        """Begin with no token."""
        self.experts = experts
        self._running = RunningMoment(size, device=device)

    def add(self, vectors: Tensor) -> None:
        """Add tokens, (tokens, size); each counts once for every expert that it is routed to."""
        self._running.add(vectors)

    @cached_property
    def moment(self) -> Moment:
        """The sum; nothing may be added to it then."""
        return self._running.taken()

    @cached_property
    def effective_rank(self) -> float:
        """(tr P)² / ‖P‖², the number of directions that the vectors P is summed over fill; 0 of none."""
        norm = float(torch.linalg.vector_norm(self.moment.total))
        return (float(self.moment.total.diagonal().sum()) / norm) ** 2 if norm else 0.0

    def share(self, tokens: int) -> float:
        """Say which share of an expert's curvature is the pool's, see `expert_sums`."""
        return (self.effective_rank + 1) / (tokens + self.effective_rank + 1)


class RoutedMoment:
    """A sum of x xᵀ over the tokens that are routed to one expert.

    The tokens themselves are kept while they are fewer than the sum has rows, since that is smaller.

    Example:
        >>> import torch
        >>> routed = RoutedMoment(Pool(2, experts=8))
        >>> routed.add(torch.tensor([[1.0, 2.0]]))
        >>> routed.tokens, routed.total(2).tolist()
        (1, [[1.0, 2.0], [2.0, 4.0]])
    """

    def __init__(self, pool: Pool) -> None:
        """Begin with no token."""
        self.pool = pool
        self.tokens = 0
        self._kept: list[Tensor] = []
        self._running: RunningMoment | None = None

    def add(self, vectors: Tensor) -> None:
        """Add tokens to the expert's and to the pool.

        Args:
            vectors: (tokens, size), in any dtype.
        """
        self.tokens += len(vectors)
        self.pool.add(vectors)
        if self._running is None:
            self._kept.append(vectors.clone())
            if self.tokens <= vectors.shape[1]:
                return
            self._running = RunningMoment(vectors.shape[1], device=vectors.device)
            vectors, self._kept = torch.cat(self._kept), []
        self._running.add(vectors)

    def total(self, size: int) -> Tensor:
        """Compute the sum, (size, size); nothing may be added to it then."""
        if self._running is not None:
            return self._running.taken().total
        like = self.pool.moment.total
        vectors = torch.cat(self._kept).to(like) if self._kept else like.new_zeros(0, size)
        return vectors.T @ vectors


def take_sums(group: LayerGroup, sums: MutableMapping[str, RunningMoment | RoutedMoment]) -> Sums:
    """Take one group's sums out of those of all (see `LayerGroup.matrices`), so that memory gets free."""
    inputs = sums.pop(input_name(group.name))
    outputs = [sums.pop(output_name(layer)) for layer in group.layers]
    if isinstance(inputs, RoutedMoment):
        return shrunk_sums(group, inputs, [each for each in outputs if isinstance(each, RoutedMoment)])
    totals = (each.taken().total for each in outputs if isinstance(each, RunningMoment))
    return Sums(inputs.taken(), tuple(totals))


def shrunk_sums(group: LayerGroup, inputs: RoutedMoment, outputs: Sequence[RoutedMoment]) -> Sums:
    """Shrink the sums of one expert towards those of all experts of its block.

    With n tokens of its own, S their sum, P and m the sum and the tokens of the pool, E experts, and the
    share of the pool a = (r + 1) / (n + r + 1), r being the pool's effective rank,

        H = (1 - a) S / n + a P / m,        G = (1 - a) S + a P / E,

    the second as a sum over all tokens. So an expert that no token reaches counts as the mean one.

    Args:
        group: the layers of the expert, with the number of all tokens, routed to it or not.
        inputs: of the group.
        outputs: gradients of each layer.

    Returns:
        The sums, in the scale of a layer that sees every token.
    """
    pool, share = inputs.pool, inputs.pool.share(inputs.tokens)
    mean = pool.moment.total * (share / pool.moment.tokens)
    if inputs.tokens:
        mean += inputs.total(group.in_features) * ((1 - share) / inputs.tokens)
    totals: list[Tensor] = []
    shares = [share]
    for layer, routed in zip(group.layers, outputs, strict=True):
        share = routed.pool.share(routed.tokens)
        usual = routed.pool.moment.total / routed.pool.experts
        totals.append(usual.lerp(routed.total(layer.out_features), 1 - share))
        shares.append(share)
    return Sums(
        Moment(mean * group.tokens, group.tokens), tuple(totals), Reached(inputs.tokens, tuple(shares))
    )
