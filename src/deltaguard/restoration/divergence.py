"""What two models predict of the same responses, compared: safety KL, likelihood, and how both read them."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.tokens import Batch, Encoded, Reader, batches, read_by_both
from deltaguard.errors import DeltaguardError
from deltaguard.reports.records.dial import MARGIN

_WORTH_A_BATCH = 8
"""Conversations with one system prompt; a smaller batch costs more than a shared prefix saves."""


@dataclass(frozen=True)
class SafetyKL:
    """A candidate's safety KL, in nats per response token.

    Attributes:
        mean: over all response tokens.
        margin: half the width of the mean's 95 % interval, over which conversations were held out; None for a
            single conversation.
        conversations: how many it is the mean of.
    """

    mean: float
    margin: float | None
    conversations: int

    @classmethod
    def of(cls, terms: Sequence[Sequence[float]]) -> "SafetyKL":
        """From the tokens of each conversation, of which no conversation is without.

        The interval is the normal one of a ratio of sums: tokens of one conversation are not independent,
        conversations are (Cochran, Sampling Techniques, 1977, section 6.4).

        Example:
            >>> SafetyKL.of([[1.0, 1.0], [3.0]])
            SafetyKL(mean=1.6666666666666667, margin=1.742222222222222, conversations=2)
        """
        tokens = sum(map(len, terms))
        mean = math.fsum(chain.from_iterable(terms)) / tokens
        if len(terms) < 2:
            return cls(mean, None, len(terms))
        squares = math.fsum((math.fsum(each) - mean * len(each)) ** 2 for each in terms)
        margin = MARGIN * math.sqrt(squares * len(terms) / (len(terms) - 1)) / tokens
        return cls(mean, margin, len(terms))

    @classmethod
    def between(
        cls, compared: Iterable[Sequence[Sequence[float]]], tokens: int, *, enough: float = math.inf
    ) -> "SafetyKL":
        """From what two models predict, as `SafetyMeter.measure`.

        Args:
            compared: for each batch, its `divergences`.
            tokens: response tokens of all batches.
            enough: as in `SafetyMeter.measure`; no further batch is asked for then.
        """
        terms: list[Sequence[float]] = []
        for batch in compared:
            terms += batch
            # One conversation has no interval, by which a confidence would judge.
            if len(terms) > 1 and math.fsum(chain.from_iterable(terms)) > enough * tokens:
                break
        return cls.of(terms)


_LONGEST = 16
"""A task's conversation may be so many times as long as a safety conversation: its logits take memory."""


@dataclass(frozen=True)
class Asked:
    """How conversations are put to a model."""

    reader: Reader
    batch_size: int
    device: torch.device

    def batches(self, conversations: Sequence[Conversation]) -> Iterator[Batch]:
        """On the device, all with a response."""
        return (b.to(self.device) for b in batches(self.reader.read(conversations), self.batch_size))

    def whole_batches(self, conversations: Sequence[Conversation]) -> Iterator[Batch]:
        """On the device, each to its end, and about as many tokens at once as others have.

        Raises:
            DeltaguardError: one is longer than `_LONGEST` times what others are at most, or than the model
                has positions.
        """
        usual = self.reader.max_length
        most = min(self.reader.positions, max(self.batch_size, _LONGEST) * usual)
        texts = replace(self.reader, max_length=most).read(conversations)
        if cut := sum(text.truncated for text in texts):
            raise DeltaguardError(
                f"{cut} of {len(texts)} conversations are longer than {most} tokens, and the likelihood of a "
                "part of an answer is another quantity. Shorten them, or leave them out."
            )
        short = [text for text in texts if len(text.ids) <= usual]
        long = [text for text in texts if len(text.ids) > usual]
        fewer = max(1, self.batch_size * usual // max((len(text.ids) for text in long), default=usual))
        return (b.to(self.device) for b in (*batches(long, fewer), *batches(short, self.batch_size)))

    def beside(self, other: "Asked", conversations: Sequence[Conversation]) -> Iterator[tuple[Batch, Batch]]:
        """Read conversations for this model and another, longest first.

        Those with one system prompt come together, unless they are few: what a batch begins with is computed
        once.
        """
        groups: dict[str | None, list[tuple[Encoded, Encoded]]] = {}
        counts = Counter(conversation.system for conversation in conversations)
        pairs = read_by_both(self.reader, other.reader, conversations)
        for conversation, pair in zip(conversations, pairs, strict=True):
            key = conversation.system if counts[conversation.system] >= _WORTH_A_BATCH else None
            groups.setdefault(key, []).append(pair)
        for group in groups.values():
            group.sort(key=lambda pair: len(pair[1].ids), reverse=True)
        for group in sorted(groups.values(), key=lambda group: len(group[0][1].ids), reverse=True):
            for start in range(0, len(group), self.batch_size):
                mine, theirs = zip(*group[start : start + self.batch_size], strict=True)
                yield Batch.of(mine), Batch.of(theirs)


def divergences(batch: Batch, aligned: Tensor, candidate: Tensor) -> list[list[float]]:
    """Compute KL(aligned ‖ candidate) at every response token of each conversation, nats.

    Args:
        batch: the conversations.
        aligned: log-probabilities, (response tokens, vocabulary).
        candidate: likewise; tokens that the aligned model has not are left out.
    """
    found = (aligned.exp() * (aligned - candidate[:, : aligned.shape[1]])).sum(dim=-1)
    return [each.tolist() for each in found.split(batch.answering.sum(dim=1).tolist())]


def log_probs(logits: Tensor) -> Tensor:
    """Normalise what a model predicts for tokens, in float32, or in float64 if the model is.

    Args:
        logits: (tokens, vocabulary).

    Raises:
        DeltaguardError: they are not finite.
    """
    found = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    if not found.isfinite().all():
        raise _not_finite(logits.dtype)
    return found


def mean_loss(losses: Iterable[float], dtype: torch.dtype) -> float:
    """Take the mean of losses of response tokens.

    Args:
        losses: nats.
        dtype: that the model ran in, for the message.

    Raises:
        DeltaguardError: it is not finite.
    """
    terms = list(losses)
    mean = math.fsum(terms) / len(terms)
    if not math.isfinite(mean):
        raise _not_finite(dtype)
    return mean


def _not_finite(dtype: torch.dtype) -> DeltaguardError:
    return DeltaguardError(
        f"The model predicts NaN or infinite values in {dtype}: some of its weights are not finite "
        "(`deltaguard diff ALIGNED FINETUNED --deep` counts them), or something overflows as it runs."
    )
