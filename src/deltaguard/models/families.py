"""What deltaguard knows of model families: the names of their tensors, and the modules transformers builds.

Whoever adds an architecture looks here, and at the table of tiny models in `tests/models.py`: tests hold each
of them to what transformers builds.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# transformers builds the blocks of these from Conv1D.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
# transformers stacks the experts of these as (in, out).
_STACKED_IN_OUT = frozenset({"llama4", "llama4_text", "gpt_oss"})
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tokens_embed", "embeddings")
_OUTPUT_HEADS = ("lm_head", "embed_out", "output_layer", "output_projection")

_BLOCK = re.compile(r"(^|\.)(?P<number>\d+)\.")
_FURTHER_TOKENS = re.compile(r"(^|\.)mtp\.")
_KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm", "v_norm")
_BLOCK_MATRIX = re.compile(r"(^|\.)\d+\..+\.weight$")
_STACK = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
# Attention masks that old checkpoints of GPT-2 and GPT-NeoX hold.
_MASK = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")


def stored_in_out(config: Mapping[str, Any], tensor: str) -> bool:
    """Tell whether a linear layer's weight is stored as (in, out), as GPT-2 does, and not as (out, in).

    The weights of experts that are stacked in one tensor are told alike.

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
    if not isinstance(known, str) or _BLOCK.search(tensor) is None:
        return False
    return known in (_STACKED_IN_OUT if _STACK.search(tensor) else _CONV1D_MODELS)


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor is a matrix within a numbered decoder block, by which layers are restored.

    Example:
        >>> is_block_matrix("h.0.mlp.c_fc.weight", (32, 128)), is_block_matrix("lm_head.weight", (384, 32))
        (True, False)
    """
    return len(shape) == 2 and _BLOCK_MATRIX.search(name) is not None


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor stacks the matrices of a block's experts, of which each is restored.

    Example:
        >>> is_stack("model.layers.0.mlp.experts.down_proj", (32, 48, 64))
        True
    """
    return len(shape) == 3 and _STACK.search(name) is not None


def list_of_block(name: str) -> str | None:
    """Name the list that holds the numbered block of a tensor; `None` of what is in no block.

    Example:
        >>> list_of_block("model.layers.3.mlp.up_proj.weight"), list_of_block("lm_head.weight")
        ('model.layers.', None)
    """
    block = block_of(name)
    return None if block is None else block.rstrip("0123456789.") + "."


def block_of(name: str) -> str | None:
    """Name the numbered block that a tensor belongs to; `None` of what is in no block.

    Example:
        >>> block_of("model.layers.3.mlp.experts.0.up_proj.weight"), block_of("lm_head.weight")
        ('model.layers.3.', None)
    """
    found = _BLOCK.search(name)
    return None if found is None else name[: found.end()]


def is_parameter(name: str) -> bool:
    """Tell a weight or bias from what a model computes for itself, such as masks and rotary frequencies.

    Example:
        >>> is_parameter("h.0.ln_1.bias"), is_parameter("h.0.attn.masked_bias")
        (True, False)
    """
    return name.endswith((".weight", ".bias")) and not is_mask(name)


def is_mask(name: str) -> bool:
    """Tell a buffer of older models that hides later tokens, whatever number it holds: nothing reads it.

    Example:
        >>> is_mask("gpt_neox.layers.0.attention.masked_bias")
        True
    """
    return _MASK.search(name) is not None


def is_unread(config: Mapping[str, Any], name: str) -> bool:
    """Tell a tensor of a checkpoint's decoder that transformers makes no parameter for.

    Such are the layers that predict further tokens, and keys and values of blocks that take those of earlier
    ones (Gemma 3n and 4).

    Args:
        config: the content of the model's `config.json`.
        name: of the tensor.

    Example:
        >>> is_unread({"num_hidden_layers": 61}, "model.layers.61.eh_proj.weight")
        True
    """
    if _FURTHER_TOKENS.search(name):
        return True
    # The last part describes the language model alone.
    part, found = text_parts(config)[-1], _BLOCK.search(name)
    blocks, shared = part.get("num_hidden_layers"), part.get("num_kv_shared_layers") or 0
    if found is None or not isinstance(blocks, int) or not isinstance(shared, int):
        return False
    block = int(found["number"])
    return block >= blocks or (block >= blocks - shared and _owner(name) in _KEYS_AND_VALUES)


def is_input_embedding(name: str) -> bool:
    """Tell whether a tensor is the input embedding."""
    return _owner(name) in _INPUT_EMBEDDINGS and name.endswith(".weight")


def is_output_head(name: str) -> bool:
    """Tell whether a tensor is the weight of the output head, which may be the input embedding."""
    return _owner(name) in _OUTPUT_HEADS and name.endswith(".weight")


def is_vocabulary(name: str) -> bool:
    """Tell whether a tensor has a row for each token of the vocabulary."""
    return _owner(name) in (*_INPUT_EMBEDDINGS, *_OUTPUT_HEADS) and name.endswith((".weight", ".bias"))


def with_common_head(name: str) -> str:
    """Give an output head the name that most families have for it.

    Example:
        >>> with_common_head("embed_out.weight")
        'lm_head.weight'
    """
    module, _, rest = name.partition(".")
    return f"{_OUTPUT_HEADS[0]}.{rest}" if module in _OUTPUT_HEADS else name


def kind_of(name: str) -> str:
    """Name all tensors of a kind alike, whatever their block.

    Example:
        >>> kind_of("model.layers.12.mlp.up_proj.weight")
        'model.layers.*.mlp.up_proj.weight'
    """
    return re.sub(r"\.\d+\.", ".*.", name)


def text_parts(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """List what of a `config.json` may describe the language model: all of it, and its `text_config`."""
    inner = config.get("text_config")
    return (config, inner) if isinstance(inner, dict) else (config,)


def ties_embeddings(config: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Tell whether the output head is the input embedding.

    `tie_word_embeddings` of the configuration says so. Where it is absent, they are tied if no output head is
    stored.

    Args:
        config: the content of the model's `config.json`.
        tensors: names of all its tensors.
    """
    said = [part["tie_word_embeddings"] for part in text_parts(config) if "tie_word_embeddings" in part]
    known = next((value for value in said if value is not None), None)
    return not any(map(is_output_head, tensors)) if known is None else bool(known)


def modules_in_blocks(model: Any) -> "dict[str, nn.Module]":
    """Find the modules of a transformers causal language model that lie within its decoder blocks.

    Returns:
        The modules by their names in the model.
    """
    from torch import nn

    own = set(model.get_decoder().modules())
    named = {name: module for name, module in model.named_modules() if module in own}
    lists = tuple(f"{name}." for name, module in named.items() if isinstance(module, nn.ModuleList))
    return {name: module for name, module in named.items() if name.startswith(lists)}


def decoder_blocks(model: Any) -> "nn.ModuleList":
    """Find the list of decoder blocks of a transformers causal language model.

    Towers that see pictures or hear sounds may have more blocks: they are no part of the decoder.
    """
    from torch import nn

    return max((each for each in model.get_decoder().modules() if isinstance(each, nn.ModuleList)), key=len)


def is_linear(module: "nn.Module") -> bool:
    """Tell whether a module multiplies by its weight, which deltaguard can restore."""
    from torch import nn

    return isinstance(module, nn.Linear) or is_conv1d(module) or is_router(module)


def is_router(module: "nn.Module") -> bool:
    """Tell whether a module chooses experts by the product with its weight, and puts out more than that."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Router") and weight is not None and weight.ndim == 2


def product_of(module: "nn.Module", output: Any) -> "Tensor":
    """Take the product with its weight out of what a linear module puts out."""
    if not isinstance(output, tuple):
        return output
    return output[1] if type(module).__name__ == "Llama4Router" else output[0]


def is_conv1d(module: "nn.Module") -> bool:
    """Tell whether transformers built a linear layer whose weight is stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _owner(name: str) -> str:
    """Find the module that a tensor belongs to, without those around it."""
    return name.rpartition(".")[0].rpartition(".")[2]
