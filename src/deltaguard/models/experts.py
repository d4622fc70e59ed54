"""Mixtures of experts: the tensors of a checkpoint, and the stacks that transformers makes of them.

A model has two stacks for the experts of a block, `experts.gate_up_proj` and `experts.down_proj`, with a
matrix for each expert. Most checkpoints hold a tensor for each expert and projection instead; some hold the
stacks.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import name_map
from deltaguard.models.families import text_parts, with_common_head

if TYPE_CHECKING:
    from torch import Tensor

Stack = Literal["gate_up_proj", "down_proj"]
"""What the experts of a block multiply by, first and last."""

_UNDER_EXPERTS = re.compile(r"(^|\.)experts?\.")
_ONE_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")
_STACKED = re.compile(r".*\.experts\.(gate_up_proj|down_proj)(_bias)?")
_LAYER = re.compile(r"(?P<experts>.*\.experts)\.(?:(?P<one>\d+)\.\w+|\w+\.(?P<stacked>\d+))")
_PROJECTIONS: Mapping[str, tuple[Stack, int | None]] = MappingProxyType(
    {
        **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
        **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
        **dict.fromkeys(("down_proj", "w2"), ("down_proj", None)),
    }
)
"""The stack that holds a projection, and which half of the expert's rows there; None for all of them."""

_NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call how many experts a block has."""

_RENAMED = ".block_sparse_moe.", ".mlp."
"""What Mixtral's checkpoints and the models that transformers builds of them call the same module."""


@dataclass(frozen=True)
class Part:
    """The part of a model's parameter that a tensor of a checkpoint gives the values of.

    Attributes:
        tensor: its name in the checkpoint.
        expert: the matrix of a stack; None where the tensor is the parameter as a whole.
        half: 0 or 1, of the rows of that matrix; None for all of them.
    """

    tensor: str
    expert: int | None = None
    half: int | None = None

    def of(self, parameter: "Tensor") -> "Tensor":
        """View the part in the parameter.

        Example:
            >>> import torch
            >>> Part("experts.1.up_proj.weight", 1, 1).of(torch.arange(8).reshape(2, 4, 1)).flatten().tolist()
            [6, 7]
        """
        found = parameter if self.expert is None else parameter[self.expert]
        return found if self.half is None else found.chunk(2)[self.half]


def parts_of(parameters: Collection[str], tensors: Collection[str]) -> dict[str, tuple[Part, ...]]:
    """Say which tensors of a checkpoint give the values of a model's parameters.

    Args:
        parameters: names in the model.
        tensors: names in the checkpoint; where all have another prefix, that is exchanged (see `name_map`).

    Returns:
        The parts of each parameter that has any, by experts and halves.

    Example:
        >>> tensors = ["h.0.experts.0.w1.weight", "h.0.experts.0.w3.weight", "h.0.norm.weight"]
        >>> found = parts_of(["h.0.experts.gate_up_proj", "h.0.norm.weight"], tensors)
        >>> {name: [part.half for part in parts] for name, parts in found.items()}
        {'h.0.experts.gate_up_proj': [0, 1], 'h.0.norm.weight': [None]}
    """
    known, renames = set(parameters), not any(_RENAMED[0] in name for name in parameters)
    found: dict[str, list[Part]] = {}
    for tensor in tensors:
        part, name = Part(tensor), tensor
        one = _ONE_EXPERT.fullmatch(tensor)
        if one and one["projection"] in _PROJECTIONS:
            stack, half = _PROJECTIONS[one["projection"]]
            part, name = Part(tensor, int(one["number"]), half), f"{one['experts']}.{stack}"
        if renames:
            name = name.replace(*_RENAMED)
        found.setdefault(name if name in known else with_common_head(name), []).append(part)
    return {
        parameter: tuple(sorted(found[name], key=lambda part: (part.expert or 0, part.half or 0)))
        for parameter, name in name_map(parameters, found).items()
    }


def is_expert(name: str) -> bool:
    """Tell whether a tensor of a checkpoint belongs to experts that tokens are routed to.

    Example:
        >>> is_expert("h.0.mlp.experts.3.up_proj.weight"), is_expert("h.0.mlp.shared_experts.up_proj.weight")
        (True, False)
    """
    return _UNDER_EXPERTS.search(name) is not None


def is_projection(layer: str) -> bool:
    """Tell a layer that is called as those of experts are, which a block without experts may have, too.

    Args:
        layer: its name in the model.

    Example:
        >>> is_projection("h.0.mlp.up_proj"), is_projection("h.0.self_attn.q_proj")
        (True, False)
    """
    return layer.rpartition(".")[2] in _PROJECTIONS


def expert_of(layer: str) -> str | None:
    """Name the expert that a layer belongs to; None of a layer of none.

    Args:
        layer: its name in the curvature store.

    Example:
        >>> expert_of("h.0.mlp.experts.3.up_proj"), expert_of("h.0.mlp.experts.up_proj.3")
        ('h.0.mlp.experts.3', 'h.0.mlp.experts.3')
    """
    found = _LAYER.fullmatch(layer)
    return f"{found['experts']}.{found['one'] or found['stacked']}" if found else None


def routed_share(config: Mapping[str, Any]) -> float:
    """Say which share of a block's experts each token passes.

    Args:
        config: the content of a model's `config.json`.

    Returns:
        1 where that does not say.

    Example:
        >>> routed_share({"num_local_experts": 8, "num_experts_per_tok": 2}), routed_share({})
        (0.25, 1.0)
    """
    for part in text_parts(config):
        passed = part.get("num_experts_per_tok")
        for name in _NUMBERS_OF_EXPERTS:
            count = part.get(name)
            if isinstance(passed, int) and isinstance(count, int) and 0 < passed <= count:
                return passed / count
    return 1.0


def refuse_unknown_experts(reference: str, config: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Refuse experts of which the names do not say what they are, from the headers of a checkpoint.

    Args:
        reference: what the user called the model, for the message.
        config: the content of its `config.json`.
        tensors: names of all its tensors.

    Raises:
        DeltaguardError: with all such tensors.
    """
    unknown = [name for name in tensors if is_expert(name) and not _is_known(name)]
    if unknown:
        architecture = ", ".join(config.get("architectures") or ["of unknown architecture"])
        raise DeltaguardError(
            listed(
                f"{reference} ({architecture}) is a mixture of experts in a form that deltaguard neither "
                "calibrates nor restores",
                [f"`{name}`" for name in unknown],
            )
            + "\nKnown are `experts.N.gate_proj.weight`, `up_proj` and `down_proj` (or `w1`, `w3`, `w2`) and "
            "the stacks `experts.gate_up_proj` and `experts.down_proj`."
        )


def _is_known(name: str) -> bool:
    one = _ONE_EXPERT.fullmatch(name)
    return _STACKED.fullmatch(name) is not None or (one is not None and one["projection"] in _PROJECTIONS)
