"""Which way a change of a layer makes the aligned model lean: towards refusing, or away from it.

What curvature bounds is quadratic, and a small change of one kind passes under it: one that makes every
prompt a little more, or a little less, like one that is refused. The share of refusals feels that at first
order. Its gradient is that of

    S = mean over harmful requests of ± log p(d) + mean over look-alikes of ± log p(d),

both in no framing, with d the beginning of the model's own answer by which it is told whether it refuses, +
where it does. It is taken once with the weights of every layer, and kept as a matrix of low rank;
`solvers.level` says what for.
"""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from deltaguard.chat.predictions import response_logits
from deltaguard.chat.tokens import Batch, Encoded
from deltaguard.curvature.fitting import Fitting
from deltaguard.curvature.groups import Observed
from deltaguard.curvature.leaning import RANK
from deltaguard.curvature.observe import log_probabilities
from deltaguard.curvature.sums import LinearLayer
from deltaguard.errors import DeltaguardError
from deltaguard.progress import Event, Progress
from deltaguard.ranks import Ranks
from deltaguard.solvers.low_rank import LowRank, low_rank

_SURE = 0.9
"""Share of the answers with a beginning that must be of one kind for it to tell which."""

_WITHIN = 64
"""Tokens of an answer within which it is decided: beginnings take memory by the square of their length."""


@dataclass(frozen=True)
class Decision:
    """A conversation up to where its answer is told to refuse or not.

    Attributes:
        text: its prompt, and that beginning of the answer.
        weight: of its log-probability in S; above 0 where the answer refuses.
    """

    text: Encoded
    weight: float


def decisions(texts: Sequence[Encoded], refuses: Sequence[bool | None], harmful: int) -> list[Decision]:
    """Cut conversations off where they are decided.

    That is after the first token with which nine of ten answers that begin alike are of one kind, or at the
    end where there is none: an answer that begins like no other is decided by its first token.

    Args:
        texts: conversations with the model's own answers, the harmful requests first.
        refuses: of each, whether its answer does; None where that counts for nothing.
        harmful: how many are harmful requests.

    Returns:
        One of each, in the same order; the weight is 0 of a conversation without a token of an answer, and of
        one that counts for nothing, which is cut off after one token.

    Example:
        >>> answers = [(7, 1, 2), (7, 1, 3), (7, 5, 2), (8, 1, 2)]
        >>> texts = [Encoded((0, *answer), 1, truncated=False) for answer in answers]
        >>> [len(each.text.ids) - 1 for each in decisions(texts, [True, True, False, False], harmful=2)]
        [2, 2, 2, 1]
    """
    told: Counter[tuple[int, ...]] = Counter()
    refused: Counter[tuple[int, ...]] = Counter()
    counts = [0, 0]
    for number, (text, does) in enumerate(zip(texts, refuses, strict=True)):
        if does is None:
            continue
        counts[number >= harmful] += text.has_response
        for beginning in _beginnings(text):
            told[beginning] += 1
            refused[beginning] += does
    found: list[Decision] = []
    for number, (text, does) in enumerate(zip(texts, refuses, strict=True)):
        if does is None:
            found.append(Decision(replace(text, ids=text.ids[: text.prompt_length + 1]), 0))
            continue
        alike = ((each, refused[each] if does else told[each] - refused[each]) for each in _beginnings(text))
        last = min(len(text.ids) - text.prompt_length, _WITHIN)
        length = next((len(each) for each, own in alike if own >= _SURE * told[each]), last)
        cut = replace(text, ids=text.ids[: text.prompt_length + length])
        weight = (1 if does else -1) / counts[number >= harmful] if text.has_response else 0
        found.append(Decision(cut, weight))
    return found


def _beginnings(text: Encoded) -> Iterator[tuple[int, ...]]:
    answer = text.ids[text.prompt_length :][:_WITHIN]
    return (answer[:length] for length in range(1, len(answer) + 1))


@dataclass(frozen=True)
class DecidedBatch:
    """Conversations up to where they are decided, side by side.

    Attributes:
        batch: of their texts.
        weights: theirs in S, (conversations,).
    """

    batch: Batch
    weights: Tensor

    @classmethod
    def of(cls, decided: Sequence[Decision]) -> "DecidedBatch":
        """Put conversations side by side."""
        weights = torch.tensor([each.weight for each in decided], dtype=torch.float32)
        return cls(Batch.of([each.text for each in decided]), weights)

    def to(self, device: torch.device) -> "DecidedBatch":
        """Move the batch to a device."""
        return DecidedBatch(self.batch.to(device), self.weights.to(device))

    def part(self, rows: slice) -> "DecidedBatch":
        """Take some of the conversations, padded as they are."""
        return DecidedBatch(self.batch.part(rows), self.weights[rows])

    def score(self, logits: Tensor) -> Tensor:
        """Compute what the batch adds to S.

        Args:
            logits: (response tokens, vocabulary), conversation by conversation.

        Raises:
            DeltaguardError: as `log_probabilities`.
        """
        answering = self.batch.answering
        following = self.batch.ids.roll(-1, dims=1)[answering]
        likely = log_probabilities(logits).gather(1, following[:, None])[:, 0]
        return likely @ self.weights.repeat_interleave(answering.sum(dim=1))


def decided_batches(texts: Sequence[Encoded], decided: Sequence[Decision], size: int) -> list[DecidedBatch]:
    """Put decisions in batches of the same conversations as `chat.tokens.batches` does texts of theirs.

    Args:
        texts: by whose length they are ordered, such as the whole conversations.
        decided: of each, from `decisions`.
        size: conversations in a batch.
    """
    pairs = sorted(zip(texts, decided, strict=True), key=lambda pair: len(pair[0].ids), reverse=True)
    ordered = [each for _, each in pairs]
    return [DecidedBatch.of(ordered[start : start + size]) for start in range(0, len(ordered), size)]


class Leanings:
    """The gradients of S with the weights of layers that see each token, added up over batches."""

    def __init__(self, observed: Sequence[Observed]) -> None:
        """Begin at zero.

        Args:
            observed: layers, of which no weight takes a gradient; experts are left out.
        """
        self._layers = [
            (layer, cast("Tensor", module.weight))
            for group in observed
            if group.matrix is None
            for layer, module in zip(group.layers, group.modules, strict=True)
        ]
        self._sums = [torch.zeros_like(weight, dtype=torch.float32) for _, weight in self._layers]

    @contextmanager
    def with_gradients(self) -> Generator[None]:
        """Let weights take gradients for as long as the context lasts."""
        weights = [weight for _, weight in self._layers]
        for weight in weights:
            weight.requires_grad_()
        try:
            with torch.enable_grad():
                yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    def add(
        self, made: Tensor, along: Tensor | None = None, given: Sequence[Tensor] = ()
    ) -> Sequence[Tensor]:
        """Differentiate what was computed with the weights, and add that up.

        Args:
            made: of any shape.
            along: the gradient of S by `made`; None where that is a part of S itself.
            given: what it was computed from.

        Returns:
            The gradients of S by `given`.
        """
        inputs = [*(weight for _, weight in self._layers), *given]
        found = torch.autograd.grad(made, inputs, along, allow_unused=True, materialize_grads=True)
        count = len(self._layers)
        for total, part in zip(self._sums, found[:count], strict=True):
            total.add_(part)
        return found[count:]

    def cut(self, ranks: Ranks) -> dict[str, LowRank]:
        """Add up over processes, and keep what matters.

        Args:
            ranks: the processes that shared the batches.

        Returns:
            The gradients, (out, in), by `LinearLayer.key`; of other ranks than the first none.

        Raises:
            DeltaguardError: a gradient is not finite.
        """
        found: dict[str, LowRank] = {}
        for (layer, _), total in zip(self._layers, self._sums, strict=True):
            ranks.add_up(total, 0)
            if ranks.leads:
                found[layer.key] = _kept(layer, total)
        return found


def leanings(
    model: Any,
    observed: Sequence[Observed],
    decided: Sequence[Decision],
    *,
    batch_size: int,
    report: Progress,
    ranks: Ranks,
) -> dict[str, LowRank]:
    """Differentiate S with the weight of every layer that sees each token.

    Conversations without a weight in S, such as those in framings, are not run.

    Args:
        model: a transformers causal language model, of which no parameter takes a gradient.
        observed: its layers; experts are left out.
        decided: the conversations, up to where they are decided.
        batch_size: how many are run at once.
        report: told of batches as the stage `lean`.
        ranks: the processes that share them.

    Returns:
        The gradients, (out, in), by `LinearLayer.key`; of other ranks than the first none.

    Raises:
        DeltaguardError: a prediction, or a gradient, is not finite.
        torch.OutOfMemoryError: memory does not suffice for a single conversation.
    """
    found, fitting = Leanings(observed), Fitting(report)
    counting = [each for each in decided if each.weight]
    ordered = decided_batches([each.text for each in counting], counting, batch_size)
    with found.with_gradients():
        for number in range(ranks.rank, len(ordered), ranks.size):
            whole = ordered[number].to(model.device)

            def add(rows: slice, whole: DecidedBatch = whole) -> None:
                part = whole.part(rows)
                found.add(part.score(response_logits(model, part.batch)))

            fitting.run(len(whole.weights), add)
            report(Event("lean", number + 1, len(ordered)))
    return found.cut(ranks)


def _kept(layer: LinearLayer, total: Tensor) -> LowRank:
    try:
        return low_rank(total.T if layer.transposed else total, rank=RANK)
    except ValueError as error:
        raise DeltaguardError(
            f"The gradient of refusing of `{layer.name}` is not finite: something overflows. Calibrate in "
            "float32 or bfloat16."
        ) from error
