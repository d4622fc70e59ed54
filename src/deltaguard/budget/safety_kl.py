"""Safety KL by real forward passes: a candidate's weights are put into a loaded model, not onto a disk."""

import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deltaguard.calibration.conversations import Conversation, encode
from deltaguard.calibration.observe import Batch, batches
from deltaguard.checkpoints.checkpoint import Checkpoint, WeightSource, name_map
from deltaguard.errors import DeltaguardError, listed
from deltaguard.loading import load_model, load_tokenizer
from deltaguard.logits import logits_at

_MASK = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")
_NORMAL = 1.96
_HEAD = re.compile(r"^(embed_out|output_layer)\.")
_Places = Mapping[str, tuple[Tensor, ...]]
"""The fine-tuned checkpoint's names, and the model's parameters that each of them gives the values of."""


@contextmanager
def _enough_memory() -> Generator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeltaguardError(
            f"Too little memory: take smaller batches, fewer conversations or another device. {error}"
        ) from error


@dataclass(frozen=True)
class SafetyKL:
    """A candidate's safety KL, in nats per response token.

    Attributes:
        mean: over all response tokens.
        margin: half the width of the mean's 95 % interval, over which conversations were held out; None for a
            single conversation.
    """

    mean: float
    margin: float | None

    @classmethod
    def of(cls, terms: Sequence[Sequence[float]]) -> "SafetyKL":
        """From the tokens of each conversation, of which no conversation is without.

        The interval is the normal one of a ratio of sums: tokens of one conversation are not independent,
        conversations are (Cochran, Sampling Techniques, 1977, section 6.4).

        Example:
            >>> SafetyKL.of([[1.0, 1.0], [3.0]])
            SafetyKL(mean=1.6666666666666667, margin=1.742222222222222)
        """
        tokens = sum(map(len, terms))
        mean = math.fsum(chain.from_iterable(terms)) / tokens
        if len(terms) < 2:
            return cls(mean, None)
        squares = math.fsum((math.fsum(each) - mean * len(each)) ** 2 for each in terms)
        return cls(mean, _NORMAL * math.sqrt(squares * len(terms) / (len(terms) - 1)) / tokens)


@dataclass(frozen=True)
class SafetyMeter:
    """The aligned model, loaded once; candidates are measured by putting other weights into it.

    It starts as the aligned model; what a candidate shares with the one before need not be put again.

    Attributes:
        tokens: response tokens that `measure` takes the mean over.
    """

    tokens: int
    _model: Any = field(repr=False)
    _finetuned: WeightSource = field(repr=False)
    _places: _Places = field(repr=False)
    _aligned: Sequence[tuple[Batch, Tensor]] = field(repr=False)
    _read: Callable[[Sequence[Conversation]], list[Batch]] = field(repr=False)

    @classmethod
    @_enough_memory()
    def open(
        cls,
        aligned: Checkpoint,
        finetuned: WeightSource,
        conversations: Sequence[Conversation],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 16,
        max_length: int = 512,
    ) -> "SafetyMeter":
        """Load the aligned model, and keep what it predicts for the responses of safety conversations.

        Kept on the device are log-probabilities of the whole vocabulary for every response token, in float32
        since small differences of them are what is measured: 64 conversations of 33 tokens take 0.4 GB with
        a vocabulary of 50 000, and 2 GB with one of 250 000.

        Args:
            aligned: the aligned checkpoint; its tokenizer and chat template serve for every candidate.
            finetuned: what candidates are made like. Where its vocabulary is larger, so becomes the model's.
            conversations: held-out safety conversations, all with responses.
            device: where the model runs.
            dtype: float32 where it fits: what half precision rounds away can exceed the KL to be measured.
            batch_size: conversations per forward pass.
            max_length: tokens of a conversation at most, or the model's positions; the rest is cut off.

        Raises:
            DeltaguardError: the model cannot be loaded, does not fit into memory or predicts nothing finite;
                the fine-tuned tensors do not fit it (all problems are listed); a response is missing.
        """
        tokenizer = load_tokenizer(aligned.folder, aligned.reference)
        model = load_model(aligned.folder, aligned.reference, dtype=dtype).to(device)
        places = _match(model, aligned, finetuned)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length
        read = partial(_batches, tokenizer, batch_size, min(max_length, limit), device)
        kept = [(batch, _log_probs(model, batch)) for batch in read(conversations)]
        _grow(finetuned, places)
        return cls(sum(len(known) for _, known in kept), model, finetuned, places, kept, read)

    @torch.no_grad()
    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Make tensors part of the candidate, in place and in the model's dtype.

        What the model computes for itself, such as rotary frequencies and attention masks, is ignored where
        a checkpoint holds it. An output embedding that the checkpoint does not hold is the input embedding.

        Args:
            weights: names of the fine-tuned checkpoint, and tensors of its shapes as they will be on disk.

        Raises:
            DeltaguardError: names or shapes are not the fine-tuned checkpoint's; all such are listed.
        """
        problems: list[str] = []
        for name, tensor in weights:
            info, shape = self._finetuned.tensors.get(name), tuple(tensor.shape)
            if info is None:
                problems.append(f"there is no tensor `{name}`")
            elif info.shape != shape:
                problems.append(f"`{name}` is {info.shape} there, and {shape} in the candidate")
            else:
                for place in self._places.get(name, ()):
                    place.copy_(tensor)
        if problems:
            raise DeltaguardError(listed(f"The candidate is unlike {self._finetuned.reference}", problems))

    @_enough_memory()
    def measure(self) -> SafetyKL:
        """The candidate's safety KL: the mean of KL(aligned ‖ candidate) in nats per response token.

        The sum of p (log p - log q) is over the aligned vocabulary; q is normalised over all of the
        candidate's. Rounding can make the mean negative.

        Raises:
            DeltaguardError: the candidate's predictions are not finite, or memory does not suffice.
        """
        terms: list[list[float]] = []
        for batch, aligned in self._aligned:
            candidate = _log_probs(self._model, batch)[:, : aligned.shape[1]]
            tokens = (aligned.exp() * (aligned - candidate)).sum(dim=-1)
            terms += [each.tolist() for each in tokens.split(batch.answering.sum(dim=1).tolist())]
        return SafetyKL.of(terms)

    @_enough_memory()
    def likelihood(self, conversations: Sequence[Conversation]) -> float:
        """The candidate's mean negative log-likelihood, nats per response token, of a task's conversations.

        Args:
            conversations: all with responses; cut off as the safety conversations are.

        Raises:
            DeltaguardError: as `measure`, or a conversation has no response.
        """
        terms: list[float] = []
        for batch in self._read(conversations):
            targets = batch.ids[:, 1:][batch.answering[:, :-1]]
            terms += (-_log_probs(self._model, batch).gather(1, targets[:, None])[:, 0]).tolist()
        return math.fsum(terms) / len(terms)


def _batches(
    tokenizer: Any, size: int, max_length: int, device: torch.device, conversations: Sequence[Conversation]
) -> list[Batch]:
    """On the device, all with a response."""
    texts = [encode(tokenizer, c, max_length=max_length) for c in conversations]
    bad = [i for i, text in enumerate(texts) if len(text.ids) <= text.prompt_length]
    if bad or not texts:
        example = f", such as {conversations[bad[0]].prompt[:60]!r}" if bad else ""
        raise DeltaguardError(
            f"{len(bad)} of {len(texts)} conversations have no response within {max_length} tokens{example}: "
            "give each a response, and a prompt that leaves room for it."
        )
    return [batch.to(device) for batch in batches(texts, size)]


@torch.inference_mode()
def _log_probs(model: Any, batch: Batch) -> Tensor:
    """(response tokens, vocabulary), conversation by conversation; float32, or float64 if the model is."""
    rows = logits_at(model, batch.ids, batch.mask, batch.answering)
    found = rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(dim=-1)
    if not found.isfinite().all():
        raise DeltaguardError(f"The model predicts NaN or infinite values in {rows.dtype}: use another.")
    return found


def _match(model: Any, aligned: Checkpoint, finetuned: WeightSource) -> _Places:
    """The places, once the two embeddings are as much or as little tied as the fine-tuned checkpoint's."""
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    stored = {name if name in own else _HEAD.sub("lm_head.", name): name for name in finetuned.tensors}
    names = {stored[found]: place for found, place in name_map(list(stored), list(own)).items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {place for place in own if own[place] is embedding.weight or own[place] is head.weight}
    # Where one of the two is not stored, loading ties them, whatever the aligned model does.
    one = len(ends & set(names.values())) == 1
    if not one and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        own = model.state_dict(keep_vars=True)
    places = {name: (own[place],) for name, place in names.items()}
    if one:
        places |= {name: (embedding.weight, head.weight) for name in names if names[name] in ends}
    if problems := list(_problems(model, finetuned, places)):
        raise DeltaguardError(listed(f"{finetuned.reference} does not fit {aligned.reference}", problems))
    return places


def _problems(model: Any, finetuned: WeightSource, places: _Places) -> Iterator[str]:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    growing = {id(parameter) for end in ends for parameter in end.parameters()}
    for name, info in finetuned.tensors.items():
        # Attention masks that old checkpoints hold have four dimensions, and are no weights.
        counts = len(info.shape) == 2 or (name.endswith((".weight", ".bias")) and not _MASK.search(name))
        if name not in places and counts and any(map(str.isdigit, name.split("."))):
            yield f"`{name}`, {info.shape}, has no counterpart in the model"
        for shape, place in ((tuple(place.shape), place) for place in places.get(name, ())):
            larger = id(place) in growing and info.shape[1:] == shape[1:] and info.shape > shape
            if info.shape != shape and not larger:
                yield f"`{name}` is {info.shape}, and {shape} in the model"
    known = {id(place) for group in places.values() for place in group}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            yield f"`{name}`, {tuple(parameter.shape)}, is in the model only"


@torch.no_grad()
def _grow(finetuned: WeightSource, places: _Places) -> None:
    """Give the model the rows that only the fine-tuned vocabulary has; what is tied stays tied."""
    for name, place in ((name, place) for name, group in places.items() for place in group):
        if finetuned.tensors[name].shape != tuple(place.shape):
            place.data = torch.cat([place, finetuned.read(name)[len(place) :].to(place)])
