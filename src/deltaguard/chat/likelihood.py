"""How likely a model finds given answers: teacher-forced negative log-likelihood, in nats per token.

Unlike the share of right answers it needs no generation, and it moves long before an answer changes. It
depends on the tokenizer: compare only models that share one.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaguard.chat.conversations import Conversation, Encoded, encode
from deltaguard.chat.logits import require_known_tokens
from deltaguard.errors import DeltaguardError


def negative_log_likelihood(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], *, batch_size: int
) -> list[float]:
    """Mean of -log p(token | all before it) over the tokens of each response, its closing token included.

    The prompt is put through the chat template and carries no loss. Batches hold conversations of similar
    length and are padded at the end, where a causal model does not see it, so that the batch size changes
    the result by rounding alone. The output layer sees the response's positions only.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        conversations: all with responses.
        batch_size: conversations per forward pass.

    Returns:
        Nats per token, one number a conversation, in the order given; the softmax is taken in float32.

    Raises:
        DeltaguardError: a conversation has no response, or more tokens than the model takes; the tokenizer
            has no chat template.

    Example:
        >>> pairs = [Conversation("What do bees make?", response="Honey.")]
        >>> negative_log_likelihood(model, tokenizer, pairs, batch_size=8)  # doctest: +SKIP
        [1.37]
    """
    _check_responses(conversations)
    encoded = [encode(tokenizer, c, max_length=sys.maxsize) for c in conversations]
    _check_lengths(model, conversations, encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    found = [0.0] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        means = _batch(model, [encoded[i] for i in chosen])
        for i, value in zip(chosen, means, strict=True):
            found[i] = value
    return found


@torch.inference_mode()
def _batch(model: Any, encoded: Sequence[Encoded]) -> list[float]:
    ids, mask, is_response = (tensor.to(model.device) for tensor in _padded(encoded))
    # The logits at one position predict the next token.
    require_known_tokens(model, int(ids.max()))
    predicted = is_response[:, 1:]
    kept = predicted.any(dim=0).nonzero()[:, 0]
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
    # Rows of the batch respond at different positions; only the responses' are worth a float32 copy.
    chosen = predicted[:, kept]
    losses = torch.nn.functional.cross_entropy(
        logits[chosen].float(), ids[:, 1:][:, kept][chosen], reduction="none"
    )
    rows = chosen.nonzero()[:, 0]
    sums = losses.new_zeros(len(encoded)).index_add_(0, rows, losses)
    return (sums / chosen.sum(dim=1)).tolist()


def _padded(encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and which tokens are a response's, each (conversations, tokens)."""
    shape = len(encoded), max(len(row.ids) for row in encoded)
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    is_response = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(encoded):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = 1
        is_response[number, row.prompt_length : len(row.ids)] = True
    return ids, mask, is_response


def _check_responses(conversations: Sequence[Conversation]) -> None:
    missing = [c.prompt for c in conversations if not c.response]
    if missing:
        raise DeltaguardError(
            f"{len(missing)} of {len(conversations)} conversations have no response whose likelihood could "
            f"be measured, the first being {missing[0]!r}. Give each a response."
        )


def _check_lengths(model: Any, conversations: Sequence[Conversation], encoded: Sequence[Encoded]) -> None:
    """Refuse what does not fit: the likelihood of a part of an answer is another quantity."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    long = [i for i, row in enumerate(encoded) if len(row.ids) > limit]
    if long:
        raise DeltaguardError(
            f"{len(long)} of {len(encoded)} conversations are longer than the {limit} tokens that the "
            f"model takes, the first with {len(encoded[long[0]].ids)} being "
            f"{conversations[long[0]].prompt[:60]!r}. Shorten them, or leave them out."
        )
