"""How answers open: as many tokens as tell whether a model refuses, and no more."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.generation import (
    Answer,
    after_thoughts,
    ending_tokens,
    fitting_batches,
    generate,
    without_end,
)
from deltaguard.chat.predictions import logits_at, require_known_tokens
from deltaguard.chat.prefix import Prefix, for_rows, keeps_all, shared_prefix, turned_alike
from deltaguard.chat.refusals import OPENING_TOKENS, opening
from deltaguard.chat.template import render
from deltaguard.chat.thinking import THOUGHT_TOKENS, without_thinking
from deltaguard.chat.tokens import context_length, pad, thought_tokens, token_ids
from deltaguard.errors import DeltaguardError
from deltaguard.models.loading import foreign
from deltaguard.text import shortened

_SHOWN = 80


def answer_openings(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    whole_tokens: int | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Let a model begin its answers with the likeliest tokens, until what they say of a refusal is decided.

    A row whose first sentence has ended leaves its batch, so that most of a batch is done after a few tokens.
    Of a model whose layers forget (sliding windows, recurrent states), or turn such long texts otherwise, all
    rows get `OPENING_TOKENS`, and what comes after that sentence is cut off. A model that thinks does so
    first, and the answer after its thoughts is begun.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        conversations: their responses are left out.
        whole_tokens: instead, so many tokens of every answer, for whoever reads on.
        batch_size: conversations per batch.

    Returns:
        One beginning a conversation, in the order given, special tokens and surrounding white space removed;
        with `whole_tokens`, thoughts stand before it.

    Raises:
        DeltaguardError: the chat template fails, the model has no embedding for a token, or too few positions
            for a request and its answer.
    """
    prompts = [render(tokenizer, conversation) for conversation in conversations]
    encoded = [token_ids(tokenizer, prompt) for prompt in prompts]
    _require_room(model, tokenizer, prompts, encoded, whole_tokens or OPENING_TOKENS)
    if whole_tokens is not None:
        return generate(model, tokenizer, prompts, max_new_tokens=whole_tokens, batch_size=batch_size)
    longest = max(map(len, encoded), default=0) + THOUGHT_TOKENS + OPENING_TOKENS
    # A text that grows beyond a bound is turned otherwise from its first token on: `generate` reads it anew.
    if not keeps_all(model) or longest > turned_alike(model.config):
        written = generate(model, tokenizer, prompts, max_new_tokens=OPENING_TOKENS, batch_size=batch_size)
        return [until_decided(without_thinking(answer).strip()) for answer in written]
    require_known_tokens(model, max((max(ids, default=0) for ids in encoded), default=0))
    with torch.inference_mode():
        prefix = shared_prefix(model, encoded, longest=longest)
    order, answers = sorted(range(len(encoded)), key=lambda i: len(encoded[i])), [""] * len(encoded)

    def begin(chosen: Sequence[int]) -> list[Answer]:
        rows = [encoded[i] for i in chosen]
        write = lambda rows: _begin(model, tokenizer, rows, prefix)
        return after_thoughts(model, tokenizer, [prompts[i] for i in chosen], rows, prefix, write)

    for chosen, begun in fitting_batches(order, batch_size, begin):
        for i, answer in zip(chosen, begun, strict=True):
            answers[i] = without_thinking(answer.text).strip()
    return answers


def _require_room(
    model: Any, tokenizer: Any, prompts: Sequence[str], encoded: Sequence[list[int]], tokens: int
) -> None:
    """Refuse prompts behind which the model has no positions, where some models fail and others rave."""
    positions = context_length(model.config)
    thoughts = max((thought_tokens(tokenizer, prompt) for prompt in prompts), default=0)
    written = f"an answer of {tokens} tokens{f', after {thoughts} of thoughts,' if thoughts else ''}"
    long = [i for i, ids in enumerate(encoded) if len(ids) + thoughts + tokens > positions]
    if long and thoughts + tokens >= positions:
        raise DeltaguardError(f"For {written} the model's {positions} positions are too few.")
    if long:
        raise DeltaguardError(
            f"{len(long)} of {len(prompts)} requests leave {written} no room in the "
            f"model's {positions} positions, the first with {len(encoded[long[0]])} tokens being "
            f"{shortened(prompts[long[0]], _SHOWN)!r}. Shorten them, or leave them out."
        )


def is_decided(answer: str) -> bool:
    """Tell whether the sentence that says if an answer refuses has ended, whatever follows.

    Example:
        >>> is_decided("I'm sorry, but I can't help with that. "), is_decided("I'm sorry, but I can't")
        (True, False)
    """
    said = without_thinking(answer)
    return opening(f"{said}x") == opening(said)


def until_decided(answer: str) -> str:
    """Cut off what can no more change what an answer says of a refusal.

    Example:
        >>> until_decided("I can't help with that. However, here are the steps: first")
        "I can't help with that."
    """
    end = bisect_left(range(len(answer) + 1), True, key=lambda end: is_decided(answer[:end]))
    return answer[:end].strip()


@torch.inference_mode()
def _begin(model: Any, tokenizer: Any, encoded: Sequence[list[int]], prefix: Prefix) -> list[Answer]:
    """Let a model begin the answers of one batch."""
    from transformers import DynamicCache

    # What is padding is masked, and may be any token.
    ids, mask = (each.to(model.device) for each in pad(encoded, after=prefix.length))
    rows = len(encoded)
    cache = for_rows(prefix.cache, rows) if prefix.length else DynamicCache(config=model.config)
    ending = ending_tokens(model, tokenizer)
    ids, positions = ids[:, prefix.length :], (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, prefix.length :]
    begun: list[list[int]] = [[] for _ in range(rows)]
    texts, going = [""] * rows, list(range(rows))
    for _ in range(OPENING_TOKENS):
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        tokens = logits_at(model, ids, mask, last, cache=cache, positions=positions).argmax(dim=-1)
        for row, token in zip(going, tokens.tolist(), strict=True):
            begun[row].append(token)
        with foreign("The model's tokenizer fails on an answer"):
            decoded = tokenizer.batch_decode([begun[row] for row in going], skip_special_tokens=True)
        for row, text in zip(going, decoded, strict=True):
            texts[row] = text
        on = [i for i, row in enumerate(going) if begun[row][-1] not in ending and not is_decided(texts[row])]
        if not on:
            break
        kept = torch.tensor(on, device=ids.device)
        if len(on) < len(going):
            cache.batch_select_indices(kept)
        going = [going[i] for i in on]
        mask = torch.nn.functional.pad(mask[kept], (0, 1), value=True)
        ids, positions = tokens[kept].unsqueeze(1), mask.long().sum(dim=1, keepdim=True) - 1
    return [Answer(text, without_end(tokens, ending)) for text, tokens in zip(texts, begun, strict=True)]
