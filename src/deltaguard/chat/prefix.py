"""What all prompts of a batch begin with, computed once."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WORTH_SHARING = 8
"""Tokens; for fewer, one more forward pass costs about what it saves."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that all prompts begin with, and what the model's layers keep of them.

    Attributes:
        length: how many tokens; 0 where nothing is shared.
        cache: the keys and values of those tokens, a transformers `DynamicCache` of one row; `None` where
            nothing is shared.
    """

    length: int
    cache: Any


NO_PREFIX = Prefix(0, None)
"""Nothing in common."""


def shared_prefix(model: Any, encoded: Sequence[list[int]]) -> Prefix:
    """Compute the keys and values of what all prompts begin with, in one forward pass of one row.

    A batch that continues from them gives the same answers up to rounding, since in a causal model nothing
    that follows changes them. The padding of shorter prompts then lies between the prefix and the rest: the
    attention mask hides it, and positions are counted without it. Gradients flow through it where they are
    recorded: those of all rows add up before they are taken further back, once.

    Nothing is shared where that would not hold or not be worth it: fewer than two prompts or than 8 tokens in
    common; a layer that does not attend to all earlier tokens (sliding windows, recurrent states) and so
    cannot have padding in its midst; a model that chooses a cache of its own, or does not take positions.

    Args:
        model: a transformers causal language model in evaluation mode.
        encoded: the tokens of each prompt.
    """
    length = _common_length(encoded)
    if length < _WORTH_SHARING or not keeps_all(model):
        return NO_PREFIX
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([encoded[0][:length]], device=model.device)
    model(input_ids=ids, use_cache=True, **{cache_parameter(model): cache})
    return Prefix(length, cache)


def _common_length(encoded: Sequence[list[int]]) -> int:
    """Count the tokens in common; each prompt keeps one at least to continue from."""
    if len(encoded) < 2:
        return 0
    # All sequences lie between the least and the greatest, and so does what they have in common.
    shortest = min(map(len, encoded))
    pairs = zip(min(encoded), max(encoded), strict=False)
    common = next((i for i, (one, other) in enumerate(pairs) if one != other), shortest)
    return min(common, shortest - 1)


def cache_parameter(model: Any) -> str:
    """Name the argument by which a model takes a cache; transformers 5.24 has changed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def for_rows(cache: Any, rows: int) -> Any:
    """Copy a cache of one row, since a model adds to it, with as many rows as a batch has."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_repeat_interleave(rows)
    return copied


def keeps_all(model: Any) -> bool:
    """Tell whether each layer of a model keeps and attends to all earlier tokens, wherever padding lies."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    chosen = model.generation_config
    if chosen.cache_implementation is not None or chosen.use_cache is False:
        return False
    if not {"position_ids", cache_parameter(model)} <= inspect.signature(model.forward).parameters.keys():
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
