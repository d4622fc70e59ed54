"""Safety KL by real forward passes: a candidate's weights are put into a loaded model, not onto a disk."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.openings import answer_openings
from deltaguard.chat.predictions import response_logits, response_losses
from deltaguard.chat.tokens import Batch, Reader
from deltaguard.device import as_served, enough_memory
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.canonical import counting_config, differing_fields, of_one_kind
from deltaguard.models.checkpoint import Checkpoint, WeightSource
from deltaguard.models.loading import load_config, load_generation_config, load_model, load_tokenizer
from deltaguard.restoration.divergence import Asked, SafetyKL, divergences, log_probs, mean_loss
from deltaguard.restoration.places import Places, grow, match

_ADVICE = "take smaller batches, fewer conversations or another device"


@dataclass(frozen=True)
class SafetyMeter:
    """A model, loaded once; candidates are measured by putting other weights into it.

    It starts with the aligned weights; what a candidate shares with the one before need not be put again.

    Attributes:
        tokens: response tokens that `measure` takes the mean over.
        aligned_likelihood: of the tasks given to `open`, the aligned model's; None without any.
        aligned_openings: the beginnings of its answers to the requests given to `open`.
    """

    tokens: int
    aligned_likelihood: float | None
    aligned_openings: Sequence[str] = field(repr=False)
    _model: Any = field(repr=False)
    _finetuned: WeightSource = field(repr=False)
    _places: Places = field(repr=False)
    _aligned: Sequence[tuple[Batch, Tensor]] = field(repr=False)
    _asked: "Asked" = field(repr=False)
    _whole_tokens: int | None

    @classmethod
    @enough_memory(_ADVICE)
    def open(  # noqa: PLR0913  # what is measured, on what, and how
        cls,
        aligned: Checkpoint,
        finetuned: WeightSource,
        conversations: Sequence[Conversation],
        *,
        output: Path | None = None,
        tasks: Sequence[Conversation] = (),
        requests: Sequence[Conversation] = (),
        whole_tokens: int | None = None,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 16,
        max_length: int = 512,
    ) -> "SafetyMeter":
        """Load the aligned model, keep what it predicts for responses, and make it run as the output will.

        Kept on the device are log-probabilities of the whole vocabulary for every response token, in float32:
        64 conversations of 33 tokens take 0.4 GB with a vocabulary of 50 000, and 2 GB with one of 250 000.

        Args:
            aligned: the aligned checkpoint.
            finetuned: what candidates are made like. Where its vocabulary is larger, so becomes the model's.
            conversations: held-out safety conversations, all with responses.
            output: a folder with the configuration, tokenizer and chat template that candidates will have;
                the aligned model's where absent. Under another configuration weights are loaded anew.
            tasks: conversations of which the aligned model's likelihood is kept too.
            requests: conversations of which the beginnings of the aligned model's answers are kept.
            whole_tokens: of answers, see `chat.openings.answer_openings`.
            device: where the model runs.
            dtype: float32 where it fits: what half precision rounds away can exceed the KL to be measured.
            batch_size: conversations per forward pass.
            max_length: tokens of a conversation at most, or the model's positions; the rest is cut off.

        Raises:
            DeltaguardError: the model cannot be loaded, does not fit into memory or predicts nothing finite;
                the fine-tuned tensors do not fit it (all problems are listed); a response is missing, or is
                other tokens to the output's tokenizer.
        """
        source = aligned.folder, aligned.reference
        model = load_model(*source, dtype=dtype).to(device)
        own = Asked(Reader.of(load_tokenizer(*source), model.config, max_length), batch_size, device)
        other, config = own, None
        if output is not None:
            config = load_config(output, finetuned.reference)
            tokenizer = load_tokenizer(output, finetuned.reference)
            # For messages, which must not speak of a folder that is gone.
            tokenizer.name_or_path = finetuned.reference
            other = replace(own, reader=Reader.of(tokenizer, config, max_length))
        pairs = own.beside(other, conversations)
        kept = [(batch.to(device), _log_probs(model, known.to(device))) for known, batch in pairs]
        likelihood = _likelihood(model, own.whole_batches(tasks)) if tasks else None
        openings = _openings(model, own.reader.tokenizer, requests, whole_tokens) if requests else []
        if config is not None and not _runs_alike(config, load_config(*source)):
            _make_loadable(config, model.config)
            # Two models at once might not fit.
            del model
            model = load_model(*source, dtype=dtype, config=config).to(device)
        if output is not None:
            model.generation_config = load_generation_config(output, finetuned.reference, config)
        places = match(model, aligned, finetuned)
        grow(finetuned, places)
        tokens = sum(len(known) for _, known in kept)
        return cls(tokens, likelihood, openings, model, finetuned, places, kept, other, whole_tokens)

    def for_another(self, aligned: Checkpoint, finetuned: WeightSource) -> "SafetyMeter":
        """Put the aligned weights back, and take candidates of another fine-tune in this one's place.

        Args:
            aligned: the aligned checkpoint.
            finetuned: the other one. It has the aligned model's tensors and shapes, as this one has, and its
                candidates are run and asked with the same files.
        """
        other = replace(self, _finetuned=finetuned)
        other.put((name, aligned.read(name)) for name in aligned.tensors)
        other.tokenizer.name_or_path = finetuned.reference
        return other

    @property
    def model(self) -> Any:
        """The loaded model, with the weights that were put last."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """What candidates read text with."""
        return self._asked.reader.tokenizer

    @property
    def known(self) -> Sequence[tuple[Batch, Tensor]]:
        """The conversations as candidates read them, and the aligned model's log-probabilities for them."""
        return self._aligned

    def place(self, name: str) -> Tensor:
        """Give the parameter that holds a tensor of the fine-tuned checkpoint, one that nothing shares."""
        (found,) = self._places[name]
        return found

    def predicted(self, conversations: Sequence[Conversation]) -> list[tuple[Batch, Tensor]]:
        """Keep what the model predicts now for the responses of conversations, like `known`.

        Raises:
            DeltaguardError: as `measure`, or a conversation has no response.
        """
        return [(batch, _log_probs(self._model, batch)) for batch in self._asked.batches(conversations)]

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

    @enough_memory(_ADVICE)
    def measure(self, *, enough: float = math.inf) -> SafetyKL:
        """Measure the candidate's safety KL: the mean of KL(aligned ‖ candidate) in nats per response token.

        The sum of p (log p - log q) is over the aligned vocabulary; q is normalised over all of the
        candidate's. Rounding can make the mean negative.

        Args:
            enough: a mean of which it need only be known that it is exceeded. No token's KL is negative, so
                that the first batches may show it; the result is then of their conversations alone.

        Raises:
            DeltaguardError: the candidate's predictions are not finite, or memory does not suffice.
        """
        compared = (
            divergences(batch, aligned, _log_probs(self._model, batch)) for batch, aligned in self._aligned
        )
        return SafetyKL.between(compared, self.tokens, enough=enough)

    @enough_memory(_ADVICE)
    def likelihood(self, conversations: Sequence[Conversation]) -> float:
        """Measure the mean negative log-likelihood of a task's conversations, nats per response token.

        Args:
            conversations: all with responses.

        Raises:
            DeltaguardError: as `measure`, or a conversation has no response, or is too long (see
                `Asked.whole_batches`).
        """
        return _likelihood(self._model, self._asked.whole_batches(conversations))

    @enough_memory(_ADVICE)
    def openings(self, conversations: Sequence[Conversation]) -> list[str]:
        """Let the candidate begin its answers to requests, see `chat.openings.answer_openings`."""
        return _openings(self._model, self._asked.reader.tokenizer, conversations, self._whole_tokens)


def _runs_alike(one: Any, other: Any) -> bool:
    """Whether two configurations of transformers differ in nothing but the size of the vocabulary."""
    fields = differing_fields(*map(counting_config, of_one_kind(one.to_dict(), other.to_dict())))
    return all(name.rpartition(".")[2] == "vocab_size" for name, _, _ in fields)


def _make_loadable(config: Any, aligned: Any) -> None:
    """Give a configuration the shapes of the aligned weights; `match` and `grow` care for rows and ties."""
    text, own = config.get_text_config(), aligned.get_text_config()
    text.vocab_size = own.vocab_size
    # It is no row of them where it is one of the further tokens; what is padding is masked.
    text.pad_token_id = own.pad_token_id
    config.tie_word_embeddings = aligned.tie_word_embeddings


def _openings(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], whole_tokens: int | None
) -> list[str]:
    with as_served(model):
        return answer_openings(model, tokenizer, conversations, whole_tokens=whole_tokens)


def _likelihood(model: Any, read: Iterable[Batch]) -> float:
    losses = (loss for batch in read for each in response_losses(model, batch) for loss in each)
    return mean_loss(losses, model.dtype)


@torch.inference_mode()
def _log_probs(model: Any, batch: Batch) -> Tensor:
    """(response tokens, vocabulary), conversation by conversation."""
    return log_probs(response_logits(model, batch))
