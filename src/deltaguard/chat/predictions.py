"""What a causal language model predicts: logits at chosen positions, and the likelihood of responses.

Unlike the share of right answers, likelihood needs no generation, and it moves long before an answer changes.
It depends on the tokenizer: compare only models that share one.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaguard.chat.conversations import Conversation, require_responses
from deltaguard.chat.prefix import cache_parameter, for_rows, output_given, shared_prefix, without_losses
from deltaguard.chat.tokens import Batch, Encoded, batches, context_length, encode, token_ids
from deltaguard.errors import DeltaguardError


def logits_at(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    chosen: Tensor,
    *,
    cache: Any = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Compute the logits of a batch at chosen positions alone (see `output_given`).

    Args:
        model: a transformers causal language model.
        ids: token ids, (conversations, tokens), padded at the end.
        mask: False for padding, the same shape.
        chosen: positions whose logits are wanted, the same shape.
        cache: keys and values of what the model has read of each conversation before, a transformers cache
            to which those of `ids` are added; `mask` then begins with those tokens.
        positions: of `ids`; None where each token stands behind all that the mask does not hide.

    Returns:
        (positions chosen, vocabulary), conversation by conversation, with a gradient where one is recorded.

    Raises:
        DeltaguardError: the model has no embedding for one of the tokens.
    """
    require_known_tokens(model, int(ids.max()))
    more: dict[str, Any] = {"use_cache": cache is not None, **without_losses(model)}
    more |= {cache_parameter(model): cache} if cache is not None else {}
    more |= {"position_ids": positions} if positions is not None else {}
    with output_given(model, lambda hidden: hidden[chosen.to(hidden.device)].unsqueeze(0)):
        logits: Tensor = model(input_ids=ids, attention_mask=mask.long(), **more).logits
    return torch.squeeze(logits, 0)


def require_known_tokens(model: Any, largest: int) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        model: a transformers causal language model.
        largest: the largest id that its tokenizer gave.

    Raises:
        DeltaguardError: the model has fewer embeddings.
    """
    rows = len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise DeltaguardError(
            f"The tokenizer gives the token {largest}, and the model has embeddings for {rows}: they do not "
            "belong together. Put the model's own tokenizer into its folder."
        )


def response_logits(model: Any, batch: Batch) -> Tensor:
    """Compute the logits for every response token; what all prompts begin with is computed once.

    Only response positions go through the output layer.

    Args:
        model: a transformers causal language model in evaluation mode.
        batch: on the model's device.

    Returns:
        (response tokens, vocabulary), conversation by conversation, with a gradient where one is recorded.

    Raises:
        DeltaguardError: the model has no embedding for one of the tokens.
    """
    require_known_tokens(model, int(batch.ids.max()))
    ends = (batch.answering.int().argmax(dim=1) + 1).tolist()
    prompts = [row[:end] for row, end in zip(batch.ids.tolist(), ends, strict=True)]
    prefix = shared_prefix(model, prompts, longest=batch.ids.shape[1])
    cache = for_rows(prefix.cache, len(batch.ids)) if prefix.length else None
    ids, answering = batch.ids[:, prefix.length :], batch.answering[:, prefix.length :]
    return logits_at(model, ids, batch.mask, answering, cache=cache)


@torch.inference_mode()
def response_losses(model: Any, batch: Batch) -> list[list[float]]:
    """Compute -log p(token | all before it) for every response token.

    The softmax is taken in float32, or in float64 where the model is.

    Args:
        model: a transformers causal language model in evaluation mode.
        batch: on the model's device.

    Returns:
        Nats, a list for each conversation.

    Raises:
        DeltaguardError: the model has no embedding for one of the tokens.
    """
    return losses_of(response_logits(model, batch), batch)


def losses_of(logits: Tensor, batch: Batch) -> list[list[float]]:
    """Compute -log p(token | all before it) for every response token from its logits, as `response_losses`.

    Args:
        logits: (response tokens, vocabulary), as `response_logits` gives them.
        batch: the conversations.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    targets = batch.ids[:, 1:][batch.answering[:, :-1]]
    sizes = batch.answering.sum(dim=1).tolist()
    # One conversation at a time: a copy of a batch's logits can be larger than the model.
    return [
        nn.functional.cross_entropy(each.to(precise), wanted, reduction="none").tolist()
        for each, wanted in zip(logits.split(sizes), targets.split(sizes), strict=True)
    ]


def negative_log_likelihood(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    batch_size: int,
    given: Sequence[str] | None = None,
) -> list[float]:
    """Compute the mean loss of each conversation's response, its closing token included.

    The prompt is put through the chat template and carries no loss. The batch size changes the result by
    rounding alone.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        conversations: all with responses.
        batch_size: conversations per forward pass.
        given: beginnings of the responses that carry no loss, about to the token; empty where there is none.

    Returns:
        Nats per token, one number a conversation, in the order given; NaN where a response has no token.

    Raises:
        DeltaguardError: a conversation has no response, or more tokens than the model takes; the tokenizer
            has no chat template.

    Example:
        >>> pairs = [Conversation("What do bees make?", response="Honey.")]
        >>> negative_log_likelihood(model, tokenizer, pairs, batch_size=8)  # doctest: +SKIP
        [1.37]
    """
    require_responses(conversations, "whose likelihood could be measured")
    encoded = [encode(tokenizer, c, max_length=sys.maxsize) for c in conversations]
    if given is not None:
        pairs = zip(encoded, given, strict=True)
        encoded = [row.read_on(len(token_ids(tokenizer, text))) if text else row for row, text in pairs]
    _require_short(model, conversations, encoded)
    # The order in which `batches` puts them.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids), reverse=True)
    losses = [
        each for b in batches(encoded, batch_size) for each in response_losses(model, b.to(model.device))
    ]
    # A tokenizer without an end-of-turn token may make no token at all of an odd answer.
    means = {i: sum(each) / len(each) if each else math.nan for i, each in zip(order, losses, strict=True)}
    return [means[i] for i in range(len(encoded))]


def _require_short(model: Any, conversations: Sequence[Conversation], encoded: Sequence[Encoded]) -> None:
    """Refuse what does not fit: the likelihood of a part of an answer is another quantity."""
    limit = context_length(model.config)
    long = [i for i, row in enumerate(encoded) if len(row.ids) > limit]
    if long:
        raise DeltaguardError(
            f"{len(long)} of {len(encoded)} conversations are longer than the {limit} tokens that the "
            f"model takes, the first with {len(encoded[long[0]].ids)} being "
            f"{conversations[long[0]].prompt[:60]!r}. Shorten them, or leave them out."
        )
