"""Conversations as token ids: for one model or for two, and in padded batches."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.template import apply_template, end_of_turn, render
from deltaguard.chat.thinking import (
    END,
    THOUGHT_TOKENS,
    begins_thoughts,
    closed,
    opens_thoughts,
    split_thoughts,
)
from deltaguard.errors import DeltaguardError
from deltaguard.models.loading import foreign

_SHOWN = 200
"""Characters of a rendered conversation in a message."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one conversation.

    Attributes:
        ids: token ids of the prompt, then of the response with its closing token.
        prompt_length: how many of them belong to the prompt, and to what is thought of it.
        truncated: whether tokens were cut off at the end.
    """

    ids: tuple[int, ...]
    prompt_length: int
    truncated: bool

    @property
    def has_response(self) -> bool:
        """Whether at least one token belongs to the response."""
        return len(self.ids) > self.prompt_length

    def read_on(self, count: int) -> "Encoded":
        """Count as many of the response's tokens to the prompt."""
        return replace(self, prompt_length=min(self.prompt_length + count, len(self.ids)))


@dataclass(frozen=True)
class Batch:
    """Conversations side by side, padded at the end, where a causal model does not see it.

    Attributes:
        ids: token ids, (conversations, tokens).
        mask: False for padding, the same shape.
        answering: True where the next token is one of the response, the same shape.
    """

    ids: Tensor
    mask: Tensor
    answering: Tensor

    @classmethod
    def of(cls, texts: Sequence[Encoded]) -> "Batch":
        """Put conversations side by side."""
        ids, mask = pad([text.ids for text in texts])
        answering = torch.zeros_like(mask)
        for row, text in enumerate(texts):
            answering[row, text.prompt_length - 1 : len(text.ids) - 1] = True
        return cls(ids, mask, answering)

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to a device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.answering.to(device))

    def part(self, rows: slice) -> "Batch":
        """Take some of the conversations, padded as they are."""
        return Batch(self.ids[rows], self.mask[rows], self.answering[rows])


def encode(tokenizer: Any, conversation: Conversation, *, max_length: int) -> Encoded:
    """Tokenise a conversation, and tell the prompt's tokens from the response's.

    Thoughts that the response opens with belong to the prompt. Where the template begins them, a response
    without any is an answer that was not thought about. What a model wrote is the tokens that it wrote.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        conversation: one without a response gives the tokens of its prompt.
        max_length: tokens kept at most; the end is cut off.

    Raises:
        DeltaguardError: the tokenizer has no chat template, or the template fails.
    """
    read, written = _read_and_written(tokenizer, conversation)
    prompt = token_ids(tokenizer, read)
    if written is None:
        answer = []
    elif conversation.response_ids is not None:
        answer = [*conversation.response_ids, *token_ids(tokenizer, end_of_turn(tokenizer))]
    else:
        answer = token_ids(tokenizer, written + end_of_turn(tokenizer))
    ids = (*prompt, *answer)
    return Encoded(ids[:max_length], min(len(prompt), max_length), truncated=len(ids) > max_length)


def _read_and_written(tokenizer: Any, conversation: Conversation) -> tuple[str, str | None]:
    """Give what the model reads before it answers, its own thoughts among it, and the answer."""
    rendered, response = render(tokenizer, conversation), conversation.response
    if response is None:
        return rendered, None
    if not begins_thoughts(rendered) and not (opens_thoughts(response) and END in response):
        return rendered, response
    thoughts, answer = split_thoughts(response)
    return rendered + thoughts, answer


def thought_tokens(tokenizer: Any, prompt: str) -> int:
    """Count the tokens that thoughts take at most, and their end, where a rendered prompt begins them."""
    return THOUGHT_TOKENS + len(token_ids(tokenizer, closed(""))) if begins_thoughts(prompt) else 0


def encode_answer(
    tokenizer: Any, turns: Sequence[Mapping[str, str]], answer: str, *, max_length: int
) -> Encoded:
    """Tokenise turns as the model reads them when it is asked, and what it learns to answer.

    The answer is what the chat template writes of it. Where the template begins thoughts, and leaves them out
    where an answer follows, they are closed without any.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        turns: as `readable_turns` writes them.
        answer: what the assistant says then.
        max_length: tokens kept at most; the end is cut off.

    Raises:
        DeltaguardError: there is no template, or it fails, or shows other turns to a model that answers than
            to one that is asked.
    """
    read = apply_template(tokenizer, turns)
    whole = [*turns, {"role": "assistant", "content": answer}]
    text = apply_template(tokenizer, whole, answer_follows=False)
    if text.startswith(read):
        written = text[len(read) :]
        thoughts, end, answered = written.partition(END)
        if end and begins_thoughts(read) and not thoughts.strip():
            # That there are none is not to be learned.
            told = len(written) - len(answered.lstrip())
            read, written = read + written[:told], written[told:]
    elif begins_thoughts(read):
        read, written = read + closed(""), answer + end_of_turn(tokenizer)
    else:
        raise DeltaguardError(
            f"The chat template of {tokenizer.name_or_path!r} shows turns otherwise where an answer follows: "
            f"{read[-_SHOWN:]!r} is no beginning of {text[-_SHOWN:]!r}. A model would learn to "
            "answer what it is never asked: correct the template."
        )
    prompt, ids = token_ids(tokenizer, read), token_ids(tokenizer, read + written)
    if ids[: len(prompt)] != prompt:
        # Tokens merge where the answer begins.
        ids = [*prompt, *token_ids(tokenizer, written)]
    return Encoded(tuple(ids[:max_length]), min(len(prompt), max_length), truncated=len(ids) > max_length)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text that holds its special tokens already.

    Raises:
        DeltaguardError: the tokenizer fails.
    """
    with foreign(f"The tokenizer of {tokenizer.name_or_path!r} fails on a text"):
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def pad(rows: Sequence[Sequence[int]], *, value: int = 0, after: int | None = None) -> tuple[Tensor, Tensor]:
    """Put rows of token ids side by side.

    Args:
        rows: at least one.
        value: what padding is filled with.
        after: how many tokens of each row stand before its padding; None puts it at the end.

    Returns:
        The ids and a mask that is False for padding, each (rows, tokens of the longest row).
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for number, row in enumerate(rows):
        head = len(row) if after is None else after
        tail = width - len(row) + head
        ids[number, :head], ids[number, tail:] = torch.tensor(row[:head]), torch.tensor(row[head:])
        mask[number, :head] = mask[number, tail:] = True
    return ids, mask


def batches(texts: Sequence[Encoded], size: int) -> list[Batch]:
    """Put conversations in batches, longest first: a run that lacks memory fails at its beginning."""
    ordered = sorted(texts, key=lambda text: len(text.ids), reverse=True)
    return [Batch.of(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def context_length(config: Any, at_most: int = sys.maxsize) -> int:
    """Bound the tokens of a conversation by the positions that a model has.

    Args:
        config: the model's configuration, of transformers.
        at_most: the bound where the model has more, or its configuration does not say.
    """
    return min(getattr(config.get_text_config(), "max_position_embeddings", None) or at_most, at_most)


@dataclass(frozen=True)
class Reader:
    """How text reaches a model.

    Attributes:
        tokenizer: with its chat template.
        max_length: tokens of a conversation at most.
        positions: that the model has.
    """

    tokenizer: Any = field(repr=False)
    max_length: int
    positions: int

    @classmethod
    def of(cls, tokenizer: Any, config: Any, max_length: int) -> "Reader":
        """Read no further than a model has positions.

        Args:
            tokenizer: with its chat template.
            config: the model's configuration, of transformers.
            max_length: tokens of a conversation at most.
        """
        return cls(tokenizer, context_length(config, max_length), context_length(config))

    def read(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Tokenise conversations, cut off where they are too long.

        Raises:
            DeltaguardError: there is none, or one without a response within that length.
        """
        texts = [encode(self.tokenizer, c, max_length=self.max_length) for c in conversations]
        _require_responses(conversations, texts, self.max_length)
        return texts


def read_by_both(
    aligned: Reader, candidate: Reader, conversations: Sequence[Conversation]
) -> list[tuple[Encoded, Encoded]]:
    """Tokenise conversations for two models, so that the tokens of the responses correspond.

    Each prompt is what the model's own template and tokenizer make of it. Responses are the aligned model's
    tokens, as many as both models have room for.

    Args:
        aligned: how text reaches the aligned model.
        candidate: how it reaches the other one.
        conversations: all with responses.

    Returns:
        What the aligned model reads and what the other one does, in the order given.

    Raises:
        DeltaguardError: the tokenizers give a response other ids, or a response is missing (see `read`).
    """
    own = aligned.read(conversations)
    _require_same_tokens(aligned, candidate, conversations, own)
    pairs: list[tuple[Encoded, Encoded]] = []
    for conversation, text in zip(conversations, own, strict=True):
        read = encode(candidate.tokenizer, conversation, max_length=candidate.max_length)
        prompt = read.ids[: read.prompt_length]
        end = text.prompt_length + max(candidate.max_length - len(prompt), 0)
        cut = text.truncated or end < len(text.ids)
        other = (*prompt, *text.ids[text.prompt_length : end])
        pairs.append((replace(text, ids=text.ids[:end], truncated=cut), Encoded(other, len(prompt), cut)))
    _require_responses(conversations, [other for _, other in pairs], candidate.max_length)
    return pairs


def _require_same_tokens(
    aligned: Reader, candidate: Reader, conversations: Sequence[Conversation], own: Sequence[Encoded]
) -> None:
    """Refuse where the same text is other tokens to the candidate, but for tokens that only it knows."""
    end = end_of_turn(aligned.tokenizer)
    known = set(aligned.tokenizer.get_vocab().values())
    wrong: list[str] = []
    for conversation, text in zip(conversations, own, strict=True):
        written = _read_and_written(aligned.tokenizer, conversation)[1] or ""
        # Both read the text anew, which need not give the tokens that the aligned model wrote.
        expected, ids = (token_ids(each.tokenizer, written + end) for each in (aligned, candidate))
        read = len(text.ids) - text.prompt_length
        if ids[:read] != expected[:read] and known.issuperset(ids):
            example = f"{written[:60]!r}"
            wrong.append(f"{example} is {expected[:8]} to the aligned model and {ids[:8]} to the other")
    if wrong:
        raise DeltaguardError(
            f"The two tokenizers give the same text other ids: of {len(wrong)} of {len(own)} responses, such "
            f"as that {wrong[0]}. Safety KL compares predictions token by token, so it would say nothing. "
            "Take the aligned model's tokenizer (--config-from aligned)."
        )


def _require_responses(
    conversations: Sequence[Conversation], texts: Sequence[Encoded], max_length: int
) -> None:
    bad = [i for i, text in enumerate(texts) if not text.has_response]
    if bad or not texts:
        example = f", such as {conversations[bad[0]].prompt[:60]!r}" if bad else ""
        raise DeltaguardError(
            f"{len(bad)} of {len(texts)} conversations have no response within {max_length} tokens{example}: "
            "give each a response, and a prompt that leaves room for it."
        )
