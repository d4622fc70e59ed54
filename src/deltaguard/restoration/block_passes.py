"""Conversations sent through several models at once, one decoder block after another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from deltaguard.chat.predictions import losses_of
from deltaguard.chat.tokens import Batch
from deltaguard.curvature.blocks import Calls, CutModel, Read
from deltaguard.curvature.fitting import Fitting
from deltaguard.restoration.divergence import log_probs, mean_loss

Reads = Sequence[Read]
"""What gives the tensors of a block, of each model that a pass carries."""

Blocks = Iterable[Reads]
"""Of all blocks."""


@torch.no_grad()
def last_hidden(
    cut: CutModel, batches: Sequence[Batch], blocks: Blocks, fitting: Fitting
) -> list[list[Tensor]]:
    """Let conversations go through several models at once, block by block.

    Args:
        cut: a model that all of them are like, with what they have in no block.
        batches: the conversations, on its device.
        blocks: the weights of their blocks.
        fitting: says how many conversations are run at once.

    Returns:
        What the last block puts out, (conversations, tokens, hidden), for each model and batch.
    """
    calls, hidden = Calls(cut, batches), list[list[Tensor]]()
    first = [fitting.joined(len(batch.ids), partial(calls.first, i)) for i, batch in enumerate(batches)]

    def through(number: int, i: int, given: Tensor, rows: slice) -> Tensor:
        return cut.run(number, given[rows], calls.of(i, rows)[number])

    for number, reads in enumerate(blocks):
        if not hidden:
            hidden = [list(first) for _ in reads]
            # They take as much memory as what a block puts out.
            first.clear()
        for own, read in zip(hidden, reads, strict=True):
            with cut.loaded(number, read):
                for i, given in enumerate(own):
                    own[i] = fitting.joined(len(given), partial(through, number, i, given))
    return hidden


@dataclass(frozen=True)
class AlignedPredictions:
    """What the aligned model predicts for the responses of conversations.

    Attributes:
        batches: the conversations as candidates read them.
    """

    batches: Sequence[Batch]
    _cut: CutModel = field(repr=False)
    _read: Sequence[Batch] = field(repr=False)
    _hidden: Sequence[Tensor] = field(repr=False)

    @classmethod
    def of(
        cls, cut: CutModel, pairs: Sequence[tuple[Batch, Batch]], fitting: Fitting
    ) -> "AlignedPredictions":
        """Let conversations go through the aligned model.

        Args:
            cut: the model.
            pairs: batches as it reads them, and as candidates do.
            fitting: says how many conversations are run at once.
        """
        read, others = [known for known, _ in pairs], [other for _, other in pairs]
        (hidden,) = last_hidden(cut, read, own_blocks(cut), fitting)
        return cls(others, cut, read, hidden)

    @property
    def tokens(self) -> int:
        """Count the response tokens."""
        return sum(int(batch.answering.sum()) for batch in self.batches)

    @property
    def places(self) -> int:
        """Count all tokens, padding included: what goes through a block at once."""
        return sum(batch.ids.numel() for batch in self._read)

    def log_probs(self, i: int, rows: slice) -> Tensor:
        """Compute its log-probabilities for conversations of a batch, (response tokens, vocabulary)."""
        return log_probs(self._cut.logits(self._hidden[i][rows], self._read[i].part(rows)))


def own_blocks(cut: CutModel) -> Iterator[Reads]:
    """Give a model's own blocks, for a pass that carries it alone."""
    return ([cut.source.read] for _ in cut.blocks)


def likelihood(
    cut: CutModel, batches: Iterable[Batch], blocks: Callable[[], Blocks], fitting: Fitting, *, most: int
) -> float:
    """Measure the mean negative log-likelihood of responses, nats a token, block by block.

    Args:
        cut: the model, with what is in no block.
        batches: the conversations.
        blocks: gives the weights of its blocks, for each pass.
        fitting: says how many conversations are run at once.
        most: tokens, padding included, that a pass carries, but at least one batch.

    Raises:
        DeltaguardError: the predictions are not finite.
    """
    losses: list[float] = []

    def of_part(states: Tensor, batch: Batch, rows: slice) -> list[list[float]]:
        part = batch.part(rows)
        return losses_of(cut.logits(states[rows], part), part)

    for asked in _passes(batches, most):
        (hidden,) = last_hidden(cut, asked, blocks(), fitting)
        for states, batch in zip(hidden, asked, strict=True):
            with torch.no_grad():
                found = fitting.run(len(states), partial(of_part, states, batch))
            losses += [loss for part in found for each in part for loss in each]
    return mean_loss(losses, cut.dtype)


def _passes(batches: Iterable[Batch], most: int) -> Iterator[list[Batch]]:
    """Say which batches go through the blocks together."""
    chosen: list[Batch] = []
    for batch in batches:
        if chosen and sum(each.ids.numel() for each in (*chosen, batch)) > most:
            yield chosen
            chosen = []
        chosen.append(batch)
    if chosen:
        yield chosen
