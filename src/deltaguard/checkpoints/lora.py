"""What a LoRA adapter does to each tensor of a model by PEFT's rules, and which adapters do more."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaguard.checkpoints.checkpoint import Checkpoint, name_map
from deltaguard.checkpoints.layout import ADAPTER_CONFIG
from deltaguard.checkpoints.shards import TensorInfo
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import ANY_OBJECT, read_json

_PREFIX = "base_model.model."
# PEFT saves the weight under the adapter too where an embedding is adapted.
_SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b", ".base_layer.weight": "replaced"}
_FOREIGN = (".lora_", ".token_adapter.", ".base_layer.")
MERGE = (
    "Merge it first (`merged = peft_model.merge_and_unload()`, then `merged.save_pretrained(...)`) "
    "and give the merged checkpoint."
)
# With these, PEFT changes more than aligned + scale · B A, or something else.
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
    "megatron_config",
)
# All other initialisations (PiSSA, OLoRA, ...) change the model's own weights too.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# transformers builds the blocks of these from Conv1D, which stores weights as (in, out).
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_HEADS = ("lm_head.weight", "score.weight")


@dataclass(frozen=True)
class Change:
    """What an adapter holds for one tensor of the model.

    Attributes:
        a: A, (rank, in).
        b: B, (out, rank).
        scale: what B A is multiplied by.
        transposed: whether the tensor is stored as (in, out), so that (B A)ᵀ is added.
        replaced: the whole tensor, where the adapter holds it.
    """

    a: TensorInfo | None = None
    b: TensorInfo | None = None
    scale: float = 1.0
    transposed: bool = False
    replaced: TensorInfo | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors that belong to this one."""
        return tuple(part for part in (self.a, self.b, self.replaced) if part is not None)


def read_lora_config(folder: Path, reference: str) -> Any:
    """The `peft.LoraConfig` of an adapter that is plain LoRA.

    Args:
        folder: the adapter's folder.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: the folder holds no adapter, or one that cannot be expanded. All reasons are listed.
    """
    from peft import LoraConfig

    if not (folder / ADAPTER_CONFIG).exists():
        raise DeltaguardError(f"{reference} is not a PEFT adapter: there is no {ADAPTER_CONFIG}.")
    raw = read_json(folder / ADAPTER_CONFIG, ANY_OBJECT, remedy="Copy it again.")
    known = {each.name for each in dataclasses.fields(LoraConfig)}
    problems = _config_problems(raw, known)
    if problems:
        raise DeltaguardError(listed(f"The adapter {reference} cannot be expanded", [*problems, MERGE]))
    return LoraConfig(**{key: value for key, value in raw.items() if key in known})


def find_changes(
    lora: Any, tensors: Mapping[str, TensorInfo], aligned: Checkpoint
) -> tuple[dict[str, Change], list[str]]:
    """What an adapter does to each tensor of a checkpoint.

    Args:
        lora: the adapter's `peft.LoraConfig`.
        tensors: the adapter's tensors.
        aligned: the checkpoint that it belongs to.

    Returns:
        The changes by the checkpoint's names, and one sentence for each thing that does not fit.
    """
    grouped, problems = _group(tensors)
    names = name_map(grouped.keys(), aligned.tensors.keys())
    has_conv1d = lora.fan_in_fan_out or aligned.config.get("model_type") in CONV1D_MODELS
    changes: dict[str, Change] = {}
    for target, parts in grouped.items():
        if target not in names:
            problems.append(f"{aligned.reference} has no {target}{_why_absent(target, aligned)}.")
            continue
        info = aligned.tensors[names[target]]
        rank, scale = _rank_and_scale(lora, target.removesuffix(".weight"))
        conv1d = has_conv1d and not target.endswith(_HEADS)
        change = Change(parts.get("a"), parts.get("b"), scale, conv1d, parts.get("replaced"))
        changes[info.name] = change
        problem = _misfit(change, info, rank, aligned)
        if problem:
            problems.append(f"{target}: {problem}")
    return changes, problems


def _config_problems(raw: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Why an adapter with this configuration is more than aligned + scale · B A."""
    if raw.get("peft_type") != "LORA":
        return [f"its type is {raw.get('peft_type')}; only LORA is known."]
    problems = [f"it uses `{name}` ({raw[name]})." for name in _VARIANTS if raw.get(name)]
    if raw.get("bias", "none") != "none":
        problems.append(f"it trained biases (`bias` is {raw['bias']!r}).")
    initialisation = raw.get("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        problems.append(
            f"`init_lora_weights` is {initialisation!r}, which changes the model's own weights too."
        )
    problems.extend(
        f"`{name}` ({value}), of version {raw.get('peft_version', '?')}, is unknown to the installed PEFT: "
        "upgrade it."
        for name, value in raw.items()
        if value and name not in known and name not in _VARIANTS
    )
    return problems


def _group(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    """The adapter's tensors by the tensor of the model that they change, and those not understood."""
    grouped: dict[str, dict[str, TensorInfo]] = {}
    problems: list[str] = []
    for name, info in tensors.items():
        inner = name.removeprefix(_PREFIX)
        suffix = next((each for each in _SUFFIXES if inner.endswith(each)), None)
        if inner == name or (suffix is None and any(word in inner for word in _FOREIGN)):
            problems.append(f"its tensor {name} is not understood.")
        elif suffix is None:
            grouped.setdefault(inner, {})["replaced"] = info
        else:
            target = inner.removesuffix(suffix) + ".weight"
            grouped.setdefault(target, {})[_SUFFIXES[suffix]] = info
    return grouped, problems


def _rank_and_scale(lora: Any, module: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern.keys(), module), lora.r)
    alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern.keys(), module), lora.lora_alpha)
    if rank < 1:
        # B A is empty; a division by 0 would hide that the configuration does not fit A and B.
        return rank, 0.0
    return rank, alpha / math.sqrt(rank) if lora.use_rslora else alpha / rank


def _why_absent(target: str, aligned: Checkpoint) -> str:
    output = target.endswith("lm_head.weight") and aligned.tied_embeddings
    return ": its output embedding is tied to the input embedding" if output else ""


def _misfit(change: Change, info: TensorInfo, rank: int, aligned: Checkpoint) -> str | None:
    """Why what the adapter holds for a tensor cannot be used, or None."""
    if (change.a is None) != (change.b is None):
        return "the adapter has only one of lora_A and lora_B."
    whole = change.replaced
    if whole is not None and whole.shape != info.shape:
        return f"it is {whole.shape} in the adapter and {info.shape} in {aligned.reference}."
    if change.a is not None and change.b is not None:
        ranks = (change.a.shape[0], change.b.shape[-1])
        if ranks != (rank, rank):
            return f"A and B have the ranks {ranks}; the configuration says {rank}."
        shape = (change.b.shape[0], change.a.shape[-1])
        if info.shape != (shape[::-1] if change.transposed else shape):
            return f"B A is {shape} (out, in); the tensor is {info.shape} in {aligned.reference}."
    elif aligned.tied_embeddings and info.shape[0] == _vocabulary(aligned.config):
        return "it is the input embedding, which the model shares with its output, and the adapter does not."
    return None


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
