"""What a LoRA adapter does to each tensor of a model by PEFT's rules, and which adapters do more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaguard.models.checkpoint import name_map
from deltaguard.models.families import is_output_head, stored_in_out, text_parts, ties_embeddings
from deltaguard.models.lora_config import LoraConfig, find_scalings
from deltaguard.models.shards import TensorInfo

_PREFIX = "base_model.model."
# PEFT saves the weight under the adapter too where an embedding is adapted.
_BASE_LAYER = ".base_layer.weight"
_A = ".lora_A.weight"
_SUFFIXES = {_A: "a", ".lora_B.weight": "b", _BASE_LAYER: "replaced"}
_FOREIGN = (".lora_", ".token_adapter.", ".base_layer.")
STORED = ("F64", "F32", "F16", "BF16")
"""How the numbers of an adapter may be stored."""


@dataclass(frozen=True)
class Target:
    """The model that an adapter must fit, as a checkpoint or a report describes it.

    Attributes:
        reference: what the user called it.
        config: the content of its `config.json`.
        tensors: its tensors by name.
    """

    reference: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


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
    def module(self) -> str | None:
        """What PEFT calls the module that A and B belong to; None where there are none."""
        return None if self.a is None else self.a.name.removeprefix(_PREFIX).removesuffix(_A)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors that belong to this one."""
        return tuple(part for part in (self.a, self.b, self.replaced) if part is not None)


def find_changes(
    lora: LoraConfig, tensors: Mapping[str, TensorInfo], aligned: Target, reference: str
) -> tuple[dict[str, Change], list[str]]:
    """Find what an adapter does to each tensor of a model.

    Args:
        lora: the adapter's configuration.
        tensors: the adapter's tensors.
        aligned: the model that it belongs to.
        reference: what the user called the adapter, for messages.

    Returns:
        The changes by the model's names, and one sentence for each thing that does not fit.
    """
    grouped, problems = _group(tensors)
    names = name_map(grouped.keys(), aligned.tensors.keys())
    scalings = find_scalings(lora, [_module(target) for target in grouped if target in names], reference)
    ties = ties_embeddings(aligned.config, aligned.tensors)
    changes: dict[str, Change] = {}
    for target, parts in grouped.items():
        if target not in names:
            tied = ": its output embedding is tied to the input embedding"
            why = tied if ties and is_output_head(target) else ""
            problems.append(f"{aligned.reference} has no {target}{why}.")
            continue
        info = aligned.tensors[names[target]]
        scaling = scalings[_module(target)]
        in_out = stored_in_out(aligned.config, target)
        change = Change(parts.get("a"), parts.get("b"), scaling.factor, in_out, parts.get("replaced"))
        changes[info.name] = change
        problem = _odd_part(change, info) or _misfit(change, info, scaling.rank, aligned, ties=ties)
        if problem:
            problems.append(f"{target}: {problem}")
    return changes, problems


@dataclass(frozen=True)
class ChangedModules:
    """The modules that an adapter's tensors belong to, by the names that PEFT gives them.

    Attributes:
        adapted: those with A and B.
        replaced: those that it holds as a whole.
    """

    adapted: tuple[str, ...]
    replaced: tuple[str, ...]


def changed_modules(tensors: Mapping[str, TensorInfo]) -> ChangedModules:
    """Find the modules that an adapter changes.

    Args:
        tensors: the adapter's tensors.

    Example:
        >>> names = [f"base_model.model.q_proj.lora_{letter}.weight" for letter in "AB"]
        >>> changed_modules({name: TensorInfo(name, "F32", (2, 2), "file", 0, 16) for name in names})
        ChangedModules(adapted=('q_proj',), replaced=())
    """
    adapted: dict[str, None] = {}
    replaced: dict[str, None] = {}
    for target, parts in _group(tensors)[0].items():
        if parts.keys() == {"replaced"} and not parts["replaced"].name.endswith(_BASE_LAYER):
            replaced[target.rpartition(".")[0]] = None
        else:
            adapted[_module(target)] = None
    return ChangedModules(tuple(adapted), tuple(replaced))


def _group(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    """Find the adapter's tensors by the tensor of the model that they change, and those not understood."""
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


def _module(target: str) -> str:
    return target.removesuffix(".weight")


def _odd_part(change: Change, info: TensorInfo) -> str | None:
    """Why one of the adapter's tensors is none that PEFT writes, or None."""
    for part in change.parts:
        stored = STORED if part is not change.replaced else (*STORED, info.dtype)
        if part.dtype not in stored:
            return f"{part.name} is stored as {part.dtype}; it must be one of {', '.join(stored)}."
        if part is not change.replaced and (len(part.shape) != 2 or 0 in part.shape):
            return f"{part.name} is {part.shape}; it must be a matrix with entries."
    whole = change.replaced
    if whole is not None and len(change.parts) > 1 and not whole.name.endswith(_BASE_LAYER):
        return f"PEFT would not read {whole.name} beside {change.parts[0].name}."
    return None


def _misfit(change: Change, info: TensorInfo, rank: int, aligned: Target, *, ties: bool) -> str | None:
    """Why what the adapter holds for a tensor cannot be used, or None."""
    if (change.a is None) != (change.b is None):
        return "the adapter has only one of lora_A and lora_B."
    whole = change.replaced
    sizes = [part["vocab_size"] for part in text_parts(aligned.config) if "vocab_size" in part]
    if whole is not None and whole.shape != info.shape:
        return f"it is {whole.shape} in the adapter and {info.shape} in {aligned.reference}."
    if change.a is not None and change.b is not None:
        ranks = (change.a.shape[0], change.b.shape[-1])
        if ranks != (rank, rank):
            return f"A and B have the ranks {ranks}; the configuration says {rank}."
        shape = (change.b.shape[0], change.a.shape[-1])
        if info.shape != (shape[::-1] if change.transposed else shape):
            return f"B A is {shape} (out, in); the tensor is {info.shape} in {aligned.reference}."
    elif ties and info.shape[:1] == tuple(sizes[:1]):
        return "it is the input embedding, which the model shares with its output, and the adapter does not."
    return None
