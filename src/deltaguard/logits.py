"""The logits of a causal language model at chosen positions, and nowhere else."""

from typing import Any

import torch
from torch import Tensor, nn


def logits_at(model: Any, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """Run a batch and put only the chosen positions through the output layer.

    A vocabulary is so much wider than a model that logits of all positions can take more memory and time
    than all layers. The chosen hidden states are handed to the output layer in the place of all, so that
    whatever the architecture does to logits, such as a soft cap, is done to these.

    Args:
        model: a transformers causal language model.
        ids: token ids, (conversations, tokens), padded at the end.
        mask: False for padding, the same shape.
        chosen: positions whose logits are wanted, the same shape.

    Returns:
        (positions chosen, vocabulary), conversation by conversation, with a gradient where one is recorded.
    """

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden[chosen.to(hidden.device)].unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    finally:
        handle.remove()
    return torch.squeeze(logits, 0)
