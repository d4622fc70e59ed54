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
    LinearLayer,
    Moment,
    Reached,
    RunningMoment,
    Sums,
    input_name,
    output_name,
)
from deltaguard.ranks import Ranks


class Pool:
    """The sum over all experts of a block.

    Attributes:
        experts: how many there are.
        size: of a vector.
    """

    def __init__(self, size: int, experts: int, device: torch.device | str = "cpu") -> None:
        """Begin with no token."""
        self.experts, self.size = experts, size
        self._running = RunningMoment(size, device=device)

    def add(self, vectors: Tensor) -> None:
        """Add tokens, (tokens, size); each counts once for every expert that it is routed to."""
        self._running.add(vectors)

    def add_up(self, ranks: Ranks) -> None:
        """Add what all ranks summed, on all."""
        self._running.add_up(ranks)

    @cached_property
    def moment(self) -> Moment:
        """The sum; nothing may be added to it then."""
        return self._running.taken()

    def share(self, tokens: int) -> float:
        """Say which share of an expert's curvature is the pool's, see `shrunk_sums`."""
        return (self.size + 1) / (tokens + self.size + 1)


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

        Raises:
            torch.OutOfMemoryError: memory does not suffice; nothing was added.
        """
        # In the dtype of sums, so that none of them takes memory any more when another has changed.
        precise, tokens = vectors.float(), self.tokens + len(vectors)
        if self._running is not None:
            self.pool.add(precise)
            self._running.add(precise)
        elif tokens <= vectors.shape[1]:
            kept = vectors.clone()
            self.pool.add(precise)
            self._kept.append(kept)
        else:
            running = RunningMoment(vectors.shape[1], device=vectors.device)
            running.add(torch.cat([*self._kept, vectors]))
            self.pool.add(precise)
            self._running, self._kept = running, []
        self.tokens = tokens

    def add_up(self, ranks: Ranks, owner: int) -> None:
        """Add what all ranks summed, on the owner, after the pool; the others' is of no use then.

        Like a single process, it keeps the tokens while they are fewer than the sum has rows.
        """
        size = self.pool.size
        self.tokens = sum(ranks.from_all(self.tokens))
        if self.tokens > size:
            if self._running is None:
                self._running = RunningMoment(size, device=self.pool.moment.total.device)
                for vectors in self._kept:
                    self._running.add(vectors)
            self._running.add_up(ranks, owner)
        elif ranks.rank != owner:
            ranks.send(owner, None, self._kept)
        else:
            parts = [self._kept if each == owner else ranks.receive(each)[1] for each in range(ranks.size)]
            self._kept = [vectors.to(self.pool.moment.total.device) for part in parts for vectors in part]

    def total(self, size: int) -> Tensor:
        """Compute the sum, (size, size); nothing may be added to it then."""
        if self._running is not None:
            return self._running.taken().total
        like = self.pool.moment.total
        vectors = torch.cat(self._kept).to(like) if self._kept else like.new_zeros(0, size)
        return vectors.T @ vectors


AnyMoment = RunningMoment | RoutedMoment


def take_sums(group: LayerGroup, sums: MutableMapping[str, AnyMoment]) -> Sums:
    """Take one group's sums out of those of all (see `LayerGroup.matrices`), so that memory gets free."""
    inputs = sums.pop(input_name(group.name))
    outputs = [sums.pop(output_name(layer)) for layer in group.layers]
    if isinstance(inputs, RoutedMoment):
        return shrunk_sums(group, inputs, [each for each in outputs if isinstance(each, RoutedMoment)])
    totals = (output_sum(layer, each)[0] for layer, each in zip(group.layers, outputs, strict=True))
    return Sums(inputs.taken(), tuple(totals))


def shrunk_sums(group: LayerGroup, inputs: RoutedMoment, outputs: Sequence[RoutedMoment]) -> Sums:
    """Shrink the sums of one expert towards those of all experts of its block.

    With n tokens of its own, S their sum, P and m the sum and the tokens of the pool, E experts, and the
    share of the pool a = (d + 1) / (n + d + 1), d being the number of rows of S,

        H = (1 - a) S / n + a P / m,        G = (1 - a) S + a P / E,

    the second as a sum over all tokens. So an expert that no token reaches counts as the mean one.

    Args:
        group: the layers of the expert, with the number of all tokens, routed to it or not.
        inputs: of the group.
        outputs: gradients of each layer.

    Returns:
        The sums, in the scale of a layer that sees every token.
    """
    moment, share = input_sum(group, inputs)
    found = [output_sum(layer, routed) for layer, routed in zip(group.layers, outputs, strict=True)]
    shares = (share, *(each for _, each in found))
    return Sums(moment, tuple(total for total, _ in found), Reached(inputs.tokens, shares))


def input_sum(group: LayerGroup, moment: AnyMoment) -> tuple[Moment, float]:
    """Take the sum over a group's inputs; nothing may be added to it then.

    Returns:
        The sum, of an expert in the scale of a layer that sees every token; and the share of it that is the
        pool's, see `shrunk_sums`.
    """
    if isinstance(moment, RunningMoment):
        return moment.taken(), 0.0
    pool, share = moment.pool, moment.pool.share(moment.tokens)
    mean = pool.moment.total * (share / pool.moment.tokens)
    if moment.tokens:
        mean += moment.total(group.in_features) * ((1 - share) / moment.tokens)
    return Moment(mean * group.tokens, group.tokens), share


def output_sum(layer: LinearLayer, moment: AnyMoment) -> tuple[Tensor, float]:
    """Take the sum over the gradients of a layer's output, like `input_sum`."""
    if isinstance(moment, RunningMoment):
        return moment.taken().total, 0.0
    share = moment.pool.share(moment.tokens)
    usual = moment.pool.moment.total / moment.pool.experts
    return usual.lerp(moment.total(layer.out_features), 1 - share), share
