"""The synthetic model: Llama-shaped, 1.1 billion parameters, as TinyLlama has them."""

from collections.abc import Mapping

HIDDEN = 2048
INTERMEDIATE = 5632
BLOCKS = 22
HEADS = 32
KV_HEADS = 4
VOCABULARY = 32000
SHARDS = 4

WHOLE_BLOCKS = 11
"""What a store that keeps everything covers: it takes nearly 1 GB a block. Times are scaled to all blocks."""

ADAPTER_RANK = 16

_KV_ROWS = HIDDEN // HEADS * KV_HEADS

MATRICES: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (_KV_ROWS, HIDDEN),
    "self_attn.v_proj": (_KV_ROWS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""(out, in) of the linear layers of one block."""

NORMS = ("input_layernorm", "post_attention_layernorm")

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Layers of one block that see the same input."""

CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order in which it lies there."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        found |= {f"{prefix}.{kind}.weight": shape for kind, shape in MATRICES.items()}
        found |= {f"{prefix}.{norm}.weight": (HIDDEN,) for norm in NORMS}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def model_bytes() -> int:
    """Bytes of all tensors, in bfloat16."""
    return 2 * sum(map(_entries, shapes().values()))


def shard_of() -> dict[str, int]:
    """Tensor name to the number of its shard, from 1: the shards are of about the same size."""
    sizes = {name: _entries(shape) for name, shape in shapes().items()}
    share = sum(sizes.values()) / SHARDS
    numbers: dict[str, int] = {}
    done = 0
    for name, size in sizes.items():
        numbers[name] = min(SHARDS, 1 + int((done + size / 2) / share))
        done += size
    return numbers


def greedy_operations(shape: tuple[int, ...], kept_entries: float) -> float:
    """Floating-point operations that `greedy` with joint compensation cannot do without, for one matrix.

    The product of Δ with a triangular factor takes out·in² of them (one multiplication and one addition
    for each entry of the triangle), the triangular solve on the u unselected columns out·u².

    Args:
        shape: (out, in).
        kept_entries: share of the entries that take the fine-tuned value.
    """
    out, columns = shape
    unselected = (1 - kept_entries) * columns
    return out * (columns**2 + unselected**2)


def _entries(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)
