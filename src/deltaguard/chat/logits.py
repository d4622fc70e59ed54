"""The logits of a causal language model at chosen positions, and nowhere else."""

from typing import Any

import torch
from torch import Tensor, nn

from deltaguard.errors import DeltaguardError


def logits_at(model: Any, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """Run a batch, and put only the chosen positions through the output layer.

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

    Raises:
        DeltaguardError: the model has no embedding for one of the tokens.
    """

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden[chosen.to(hidden.device)].unsqueeze(0), *inputs[1:])

    require_known_tokens(model, int(ids.max()))
    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    finally:
        handle.remove()
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
