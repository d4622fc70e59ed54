"""The shapes of the synthetic models, all as Llama has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

WHOLE_BLOCKS = 11
"""What a store that keeps everything covers: it takes nearly 1 GB a block. Times are scaled to all blocks."""

ADAPTER_RANK = 16

NORMS = ("input_layernorm", "post_attention_layernorm")

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Layers of one block that see the same input."""


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model in bfloat16.

    Attributes:
        hidden: size of the hidden states.
        intermediate: size within the MLP.
        blocks: how many decoder blocks.
        heads: of the attention.
        kv_heads: of its keys and values.
        vocabulary: tokens.
        shards: files of about the same size.

    Example:
        >>> f"{LLAMA2_7B.parameters / 1e9:.2f} billion"
        '6.74 billion'
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    shards: int = 4

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block."""
        keys = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, in the order in which it lies there."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for block in range(self.blocks):
            prefix = f"model.layers.{block}"
            found |= {f"{prefix}.{kind}.weight": shape for kind, shape in self.matrices.items()}
            found |= {f"{prefix}.{norm}.weight": (self.hidden,) for norm in NORMS}
        return found | {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """Entries of all tensors."""
        return sum(map(prod, self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return 2 * self.parameters

    @property
    def shard_of(self) -> Mapping[str, int]:
        """Tensor name to the number of its shard, from 1."""
        share = self.parameters / self.shards
        numbers: dict[str, int] = {}
        done = 0
        for name, shape in self.tensors.items():
            numbers[name] = min(self.shards, 1 + int((done + prod(shape) / 2) / share))
            done += prod(shape)
        return numbers

    @property
    def config(self) -> Mapping[str, object]:
        """What `config.json` holds."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


TINY_LLAMA = Shape(hidden=2048, intermediate=5632, blocks=22, heads=32, kv_heads=4)
"""1.1 billion parameters."""

LLAMA2_7B = Shape(hidden=4096, intermediate=11008, blocks=32, heads=32, kv_heads=32, shards=8)
LLAMA3_70B = Shape(
    hidden=8192, intermediate=28672, blocks=80, heads=64, kv_heads=8, vocabulary=128256, shards=30
)
LLAMA3_405B = Shape(
    hidden=16384, intermediate=53248, blocks=126, heads=128, kv_heads=8, vocabulary=128256, shards=191
)


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


def kfac_operations(shape: tuple[int, int], share: float) -> float:
    """Floating-point operations that `kfac` cannot do without, for one matrix: two products each way.

    UᵀΔ and ΔV project the delta, UᵀΔV is a product of the smaller of both with the other's vectors; back from
    there it is as many.

    Args:
        shape: (out, in).
        share: of the eigenpairs that the store keeps.
    """
    out, columns = shape
    of_g, of_h = (max(1, int(share * size)) for size in shape)
    core = min(of_g * columns * of_h, out * of_h * of_g)
    return 2 * 2 * (of_g * out * columns + out * columns * of_h + core)
