"""How answers open: as many tokens as tell whether a model refuses, and no more."""

from collections.abc import Sequence
from typing import Any

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import generate
from deltaguard.chat.refusals import opening
from deltaguard.chat.template import render

OPENING_TOKENS = 24
"""Tokens of an answer that are generated at most: `refusals.is_refusal` reads one sentence."""


def answer_openings(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], *, batch_size: int = 64
) -> list[str]:
    """Let a model begin its answers, greedily.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        conversations: their responses are left out.
        batch_size: conversations per batch.

    Returns:
        One beginning a conversation, in the order given: `OPENING_TOKENS` at most, fewer where the first
        sentences of all answers of a batch have ended.
    """
    prompts = [render(tokenizer, conversation) for conversation in conversations]
    return generate(
        model, tokenizer, prompts, max_new_tokens=OPENING_TOKENS, batch_size=batch_size, until=is_decided
    )


def is_decided(answer: str) -> bool:
    """Tell whether the sentence that says if an answer refuses has ended, whatever follows.

    Example:
        >>> is_decided("I'm sorry, but I can't help with that. "), is_decided("I'm sorry, but I can't")
        (True, False)
    """
    return opening(f"{answer}x") == opening(answer)
