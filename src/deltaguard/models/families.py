"""What the name of a model family, and the names of its tensors, say about its weights."""

import re
from collections.abc import Mapping
from typing import Any

# transformers builds the blocks of these from Conv1D.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")


def stored_in_out(config: Mapping[str, Any], tensor: str) -> bool:
    """Tell whether a linear layer's weight is stored as (in, out), as GPT-2 does, and not as (out, in).

    Args:
        config: the content of the model's `config.json`.
        tensor: the weight's name in the checkpoint, or in an adapter over it.

    Example:
        >>> stored_in_out({"model_type": "gpt2"}, "transformer.h.0.attn.c_attn.weight")
        True
        >>> stored_in_out({"model_type": "gpt2"}, "lm_head.weight")
        False
    """
    known = config.get("model_type")
    return isinstance(known, str) and known in _CONV1D_MODELS and _IN_A_BLOCK.search(tensor) is not None
