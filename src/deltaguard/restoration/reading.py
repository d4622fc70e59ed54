"""Conversations as two models read them: each by its own chat template, the responses token for token."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltaguard.chat.conversations import Conversation, Encoded, encode, end_of_turn
from deltaguard.errors import DeltaguardError

_ANY_LENGTH = 1 << 60


@dataclass(frozen=True)
class Reader:
    """How text reaches a model.

    Attributes:
        tokenizer: with its chat template.
        max_length: tokens of a conversation at most.
    """

    tokenizer: Any = field(repr=False)
    max_length: int

    @classmethod
    def of(cls, tokenizer: Any, config: Any, max_length: int) -> "Reader":
        """Read no further than a model has positions.

        Args:
            tokenizer: with its chat template.
            config: the model's configuration, of transformers.
            max_length: tokens of a conversation at most.
        """
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(tokenizer, min(max_length, positions or max_length))

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
        unanswered = replace(conversation, response=None)
        prompt = encode(candidate.tokenizer, unanswered, max_length=candidate.max_length).ids
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
        expected = list(text.ids[text.prompt_length :])
        ids = candidate.tokenizer(f"{conversation.response}{end}", add_special_tokens=False)["input_ids"]
        if ids[: len(expected)] != expected and known.issuperset(ids):
            example = f"{(conversation.response or '')[:60]!r}"
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
    bad = [i for i, text in enumerate(texts) if len(text.ids) <= text.prompt_length]
    if bad or not texts:
        example = f", such as {conversations[bad[0]].prompt[:60]!r}" if bad else ""
        raise DeltaguardError(
            f"{len(bad)} of {len(texts)} conversations have no response within {max_length} tokens{example}: "
            "give each a response, and a prompt that leaves room for it."
        )
