"""What all prompts of a batch begin with, computed once."""

import copy
import inspect
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WORTH_SHARING = 8
"""Tokens; for fewer, one more forward pass costs about what it saves."""

_TURNING_BY_LENGTH = ("dynamic", "longrope")


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


def shared_prefix(model: Any, encoded: Sequence[list[int]], *, longest: int) -> Prefix:
    """Compute the keys and values of what all prompts begin with, in one forward pass of one row.

    A batch that continues from them gives the same answers up to rounding, since in a causal model nothing
    that follows changes them. The padding of shorter prompts then lies between the prefix and the rest: the
    attention mask hides it, and positions are counted without it. Gradients flow through it where they are
    recorded: those of all rows add up before they are taken further back, once.

    Nothing is shared where that would not hold or not be worth it: fewer than two prompts or than 8 tokens in
    common; a layer that does not attend to all earlier tokens (sliding windows, recurrent states) and so
    cannot have padding in its midst; a model that chooses a cache of its own, or does not take positions;
    texts so long that the model turns all their positions otherwise than those of a prefix alone.

    Args:
        model: a transformers causal language model in evaluation mode.
        encoded: the tokens of each prompt.
        longest: tokens of the longest text, with what may come behind its prompt.
    """
    length = _common_length(encoded)
    if length < _WORTH_SHARING or longest > turned_alike(model.config) or not keeps_all(model):
        return NO_PREFIX
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([encoded[0][:length]], device=model.device)
    with output_given(model, lambda hidden: hidden[:, -1:]):
        model(input_ids=ids, use_cache=True, **{cache_parameter(model): cache})
    return Prefix(length, cache)


@contextmanager
def output_given(model: Any, chosen: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Hand some of the hidden states to a model's output layer in the place of all.

    A vocabulary is so much wider than a model that logits of all positions can take more memory and time
    than all layers. Whatever the architecture does to logits, such as a soft cap, is done to those of these.

    Args:
        model: a transformers causal language model.
        chosen: takes them from (rows, tokens, hidden), and gives three dimensions again.
    """

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (chosen(inputs[0]), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def turned_alike(config: Any) -> float:
    """Bound the length of texts whose positions are turned alike, however long each is.

    Rotary embeddings of some kinds take other frequencies for all positions of a text that is longer.

    Args:
        config: of a transformers causal language model.

    Returns:
        Tokens; infinite where no length matters.
    """
    text = config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or {}
    # A model with layers of several kinds may have some for each.
    each = [one for one in (given, *given.values()) if isinstance(one, dict)]
    bounds = (
        one.get("original_max_position_embeddings") or text.max_position_embeddings
        for one in each
        if one.get("rope_type") in _TURNING_BY_LENGTH
    )
    return min(bounds, default=math.inf)


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


def without_losses(model: Any) -> dict[str, bool]:
    """Have a model leave out the losses of its routers, which fail on a text that goes on from a cache."""
    option = "output_router_logits"
    return {option: False} if option in inspect.signature(model.forward).parameters else {}


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

    if model.generation_config.cache_implementation is not None:
        return False
    if not {"position_ids", cache_parameter(model)} <= inspect.signature(model.forward).parameters.keys():
        return False
    # GPT-Neo's windows are its masks' alone: its cache has all layers alike.
    if "local" in getattr(model.config, "attention_layers", ()):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
