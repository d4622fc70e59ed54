"""Copies of a model's folder that differ in more than weights."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import models
from deltaguard import DeltaguardError
from pairs import held_out
from plain import safety_kl

TEMPLATE = "chat_template.jinja"
SETTINGS = (TEMPLATE, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
OTHER_TEMPLATE = models.CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}Be brief. ")

# Of each architecture, what its configuration can say otherwise while all tensors keep their shapes.
_ROPE = {"rope_theta": 100.0, "rope_type": "default"}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
_GATED = {"rope_parameters": _ROPE, "rms_norm_eps": 0.5, "hidden_act": "gelu"}
OTHER_CONFIG: dict[str, dict[str, Any]] = {
    "llama": {**_GATED, **_HEADS, "head_dim": 16},
    "qwen3": _GATED,
    "mistral": {**_GATED, **_HEADS, "head_dim": 16},
    "gemma3": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "rms_norm_eps": 0.5,
        "hidden_activation": "relu",
        "final_logit_softcapping": 3.0,
    },
    "phi3": {**_GATED, **_HEADS},
    "gpt2": {"n_head": 2, "layer_norm_epsilon": 0.5, "activation_function": "relu"},
    "gpt_neox": {
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
        "num_attention_heads": 2,
        "layer_norm_eps": 0.5,
        "hidden_act": "relu",
    },
    "opt": {"num_attention_heads": 2, "activation_function": "gelu"},
}


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def variant(source: Path, target: Path, *, template: str | None = None, **config: Any) -> Path:
    """A copy of a model's folder with another chat template or other values in its configuration."""
    shutil.copytree(source, target)
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    edited(target / "config.json", lambda content: content.update(config))
    return target


def permuted(source: Path, target: Path) -> Path:
    """A copy whose tokenizer knows the same tokens and merges, the ids of all but special ones reversed."""
    variant(source, target)
    special = len(models.SPECIAL)

    def reverse(tokenizer: dict[str, Any]) -> None:
        known = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {
            token: number if number < special else len(known) + special - 1 - number
            for token, number in known.items()
        }

    edited(target / "tokenizer.json", reverse)
    return target


def with_further_tokens(folder: Path, word: str) -> Path:
    """A fine-tune whose tokenizer has two more tokens, in rows of their own."""
    model = models.perturbed(models.tiny_model("llama"), 0.05)
    model.resize_token_embeddings(models.VOCABULARY + 2, mean_resizing=False)
    models.save(model, folder)
    tokenizer = models.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(folder)
    return folder


def same_files(one: Path, other: Path, names: Sequence[str] = SETTINGS) -> bool:
    """Whether two folders hold the same files."""
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def agrees(report: Any, aligned: Path, folder: Path, store: Path) -> bool:
    """Whether a report says of a folder what plain arithmetic finds there."""
    measured = safety_kl(aligned, folder, held_out(store))
    return report.dial.restored_kl == pytest.approx(measured, rel=1e-6, abs=1e-12)


def refusal(run: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message with which a call fails."""
    with pytest.raises(DeltaguardError) as caught:
        run(*arguments, **options)
    return str(caught.value)
