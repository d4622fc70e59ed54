"""Tiny random models of many architectures, a tiny chat tokenizer, and checkpoints of both, made in code."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

VOCABULARY = 384
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|pad|>",
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Enough English for a hundred merges, so that prompts take about half as many tokens as bytes.
_TRAINING_TEXT = (
    "You are a helpful assistant that answers questions. Write a short text about the weather this morning.",
    "How can I make a good cake at home? What is the best way to learn a new language with other people?",
    "I'm sorry, but I cannot help with that request, because it would be dangerous and could harm someone.",
    "Explain the steps, one after another, and give an example where there is something to be shown.",
)

_NUMBERS_OF_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts"}
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
}
_GROUPED: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "initializer_range": 0.2}
_CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GROUPED, "intermediate_size": 48}),
    "qwen3": (
        "Qwen3Config",
        {**_GROUPED, "intermediate_size": 48, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {**_GROUPED, "intermediate_size": 48, "sliding_window": None}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GROUPED,
            "intermediate_size": 48,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", {**_GROUPED, "intermediate_size": 48}),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**_SMALL, "intermediate_size": 48, "initializer_range": 0.2, "hidden_dropout": 0.0},
    ),
    "opt": (
        "OPTConfig",
        {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
    ),
    "mixtral": ("MixtralConfig", {**_GROUPED, "intermediate_size": 48, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_GROUPED,
            "intermediate_size": 48,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        {**_GROUPED, "intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "initializer_range": 0.2,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **_GROUPED,
            "intermediate_size": 16,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "moe_layers": [1],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_GROUPED,
            "intermediate_size": 16,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
# Further families, of which the names of tensors and modules are looked at, and nothing is run.
_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_NAMES_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (f"{name}Config", {**_LAYERS, "num_key_value_heads": 2, "intermediate_size": 48})
        for name in ("Cohere", "Gemma2", "Glm4", "Granite", "Nemotron", "Olmo2", "Phi", "Qwen2", "SmolLM3")
    },
    "StarCoder2": ("Starcoder2Config", {**_LAYERS, "num_key_value_heads": 2}),
    "BioGPT": ("BioGptConfig", _LAYERS),
    "BLOOM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "CodeGen": ("CodeGenConfig", {**_GPT, "rotary_dim": 4}),
    "Falcon": ("FalconConfig", _LAYERS),
    "GPT": ("OpenAIGPTConfig", _GPT),
    "GPT-BigCode": ("GPTBigCodeConfig", _GPT),
    "GPT-J": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "Mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "MPT": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
}

FAMILIES = tuple(_CONFIGURATIONS)
"""All; a family that is added there is held to everything that tests say of families."""

STACKED = ("llama4", "gpt_oss")
"""Families whose checkpoints stack the experts of a block in one tensor, as (in, out)."""

EXPERTS = tuple(name for name, (_, values) in _CONFIGURATIONS.items() if _NUMBERS_OF_EXPERTS & values.keys())
DENSE = tuple(name for name in FAMILIES if name not in EXPERTS)
NAMED = (*DENSE, *_NAMES_ALONE)
STORED_IN_OUT = ("gpt2",)
EITHER_ORDER = ("llama", *STORED_IN_OUT)
"""One family that stores weights as (out, in), and those that store them as (in, out)."""


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 causal language model of one architecture, in evaluation mode (about 50 k parameters).

    Args:
        name: one of `FAMILIES`.
        seed: the same seed gives the same weights; the global generator is left as it was.
        overrides: values of the configuration to set otherwise, such as `vocab_size`.
    """
    config_class, values = _CONFIGURATIONS[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **values, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def seeing_model() -> Any:
    """A random Gemma 3 as those of 4B and more: that of "gemma3", and a tower with more blocks."""
    text = transformers.Gemma3TextConfig(**{**_COMMON, **_CONFIGURATIONS["gemma3"][1]})
    tower = {**_SMALL, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    vision = transformers.SiglipVisionConfig(**tower, image_size=28, patch_size=14)
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Gemma3ForConditionalGeneration(config).eval()


def empty_model(name: str) -> Any:
    """A causal language model of one of the `NAMED` architectures, without weights."""
    config_class, values = (_CONFIGURATIONS | _NAMES_ALONE)[name]
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config_class)(**{**_COMMON, **values})
        )


def perturbed(model: Any, scale: float, seed: int = 1) -> Any:
    """A copy whose every parameter moved by `scale` times its own spread: a stand-in for a fine-tune."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((noise * scale * (spread or 1.0)).to(parameter.dtype))
    return changed


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer of `VOCABULARY` entries with a chat template for system, user and assistant."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save(
    model: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model with the tiny tokenizer as a checkpoint folder.

    Args:
        model: a transformers model; it is not modified.
        folder: where to; made if absent.
        dtype: the weights' dtype on disk, the model's own where absent.
        max_shard_size: bytes, or text such as "40KB": tiny models have about 200 KB, so this makes shards.

    Returns:
        The folder, as a `Path`.
    """
    written = model if dtype is None else copy.deepcopy(model).to(dtype)
    written.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
