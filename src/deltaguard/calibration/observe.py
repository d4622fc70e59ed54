"""Which linear layers a model has, which of them see the same input, and the sums over what they see."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaguard.checkpoints.checkpoint import WeightSource, name_map
from deltaguard.checkpoints.layout import listed
from deltaguard.curvature.moments import Moment, accumulate
from deltaguard.curvature.store_format import Layer
from deltaguard.errors import DeltaguardError

_Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class Observed:
    """Layers that see the same input.

    Attributes:
        name: the first layer's name in the checkpoint.
        module: the first layer; its input is the input of all.
        in_features: size of the input.
        layers: the layers as the checkpoint names them, in the model's order.
    """

    name: str
    module: nn.Module
    in_features: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Partial:
    """A group's sum over the first batches of a run."""

    moment: Moment
    batches: int


def refuse_experts(source: WeightSource) -> None:
    """Refuse mixtures of experts from the checkpoint's headers, before any weight is read.

    Raises:
        DeltaguardError: a tensor lies under a module named `experts`.
    """
    found = [name for name in source.tensors if "experts" in name.split(".")]
    if found:
        architecture = ", ".join(source.config.get("architectures") or ["of unknown architecture"])
        raise DeltaguardError(
            f"{source.reference} ({architecture}) is a mixture of experts: {len(found)} expert tensors, such "
            f"as `{found[0]}`. Each expert sees its own tokens, and deltaguard cannot calibrate that yet."
        )


def observe(model: Any, source: WeightSource, ids: Sequence[int]) -> tuple[list[Observed], tuple[str, ...]]:
    """Find the linear layers of the decoder blocks, and group them by the tensor object they receive.

    Args:
        model: a transformers causal language model.
        source: the checkpoint it was loaded from.
        ids: the tokens of a short text, which is run once.

    Returns:
        The groups in the model's order; and the matrices of the decoder blocks that are in none, because
        no text reaches them or because they are not linear layers.

    Raises:
        DeltaguardError: there are no such layers, or some be matched with tensors of the checkpoint that hold
            the same values, or see something other than one row per token. All are listed.
    """
    decoder = model.get_decoder()
    inside = _block_modules(model, decoder)
    linear = {name: m for name, m in inside.items() if isinstance(m, nn.Linear | Conv1D)}
    groups = _shared_inputs(decoder, linear, ids)
    if not groups:
        raise DeltaguardError(
            f"{source.reference} ({type(model).__name__}) has no linear layer inside a list of decoder "
            "blocks: there is nothing to calibrate."
        )
    weights = {f"{name}.{key}" for name, module in inside.items() for key in _matrices(module)}
    names = name_map(sorted(weights), source.tensors)
    layers = _layers(source, names, {name: linear[name] for group in groups for name in group})
    covered = {f"{name}.weight" for name in layers}
    observed = [
        Observed(
            name=layers[group[0]].tensor.removesuffix(".weight"),
            module=linear[group[0]],
            in_features=_in_features(linear[group[0]]),
            layers=tuple(layers[name] for name in group),
        )
        for group in groups
    ]
    return observed, tuple(sorted(names.get(name, name) for name in weights - covered))


class Accumulator:
    """Sums Σ x xᵀ of every group, batch by batch.

    A group's sum and the number of batches in it change together, so that the state is valid whenever
    a run is interrupted: a group that has seen a batch already skips it.

    Attributes:
        partials: the sum of every group.
    """

    def __init__(self, model: Any, observed: Sequence[Observed], partials: Mapping[str, Partial]) -> None:
        self.partials = dict(partials)
        self._decoder = model.get_decoder()
        self._observed = observed

    @property
    def batches(self) -> int:
        """How many batches all groups have seen."""
        return min(partial.batches for partial in self.partials.values())

    def add(self, batch: int, ids: Tensor, mask: Tensor) -> None:
        """Run a batch, without the language model's head, and add its tokens.

        Args:
            batch: its number, counted from 0.
            ids: (conversations, tokens), padded at the end.
            mask: the same shape, False for padding, which is not added.
        """
        chosen = mask.flatten()

        def hook(group: Observed) -> _Hook:
            def add_inputs(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                partial = self.partials[group.name]
                if partial.batches == batch:
                    tokens = inputs[0].reshape(-1, group.in_features)[chosen]
                    self.partials[group.name] = Partial(accumulate(partial.moment, tokens), batch + 1)

            return add_inputs

        with _hooked((group.module, hook(group)) for group in self._observed):
            _forward(self._decoder, ids, mask)


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, _Hook]]) -> Generator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _forward(decoder: Any, ids: Tensor, mask: Tensor) -> None:
    decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False)


def _block_modules(model: Any, decoder: nn.Module) -> dict[str, nn.Module]:
    """The decoder's modules inside a list of blocks, by their names in the model."""
    mine = set(decoder.modules())
    named = {name: module for name, module in model.named_modules() if module in mine}
    lists = tuple(f"{name}." for name, module in named.items() if isinstance(module, nn.ModuleList))
    return {name: module for name, module in named.items() if name.startswith(lists)}


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1]


def _in_features(module: nn.Module) -> int:
    return cast("Tensor", module.weight).shape[0 if isinstance(module, Conv1D) else 1]


def _shared_inputs(decoder: Any, linear: Mapping[str, nn.Module], ids: Sequence[int]) -> list[list[str]]:
    """The layers that text reaches, those together that received the same tensor object."""
    # The tensors are kept until the end, since the id of one that is gone may be given to another.
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> _Hook:
        return lambda _module, inputs: seen.append((name, inputs[0]))

    text = torch.tensor([ids], device=next(decoder.parameters()).device)
    with _hooked((module, hook(name)) for name, module in linear.items()):
        _forward(decoder, text, torch.ones_like(text))
    _refuse_odd_inputs(seen, len(ids))
    groups: dict[int, list[str]] = {}
    for name, tensor in seen:
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _refuse_odd_inputs(seen: Sequence[tuple[str, Tensor]], tokens: int) -> None:
    calls = Counter(name for name, _ in seen)
    problems = [f"`{name}` is used {count} times in one pass" for name, count in calls.items() if count > 1]
    for name, tensor in seen:
        rows = tensor.numel() // tensor.shape[-1]
        if rows != tokens:
            problems.append(f"`{name}` sees {rows} rows for {tokens} tokens")
    if problems:
        raise DeltaguardError(
            listed("Every layer must see each token once; these do not, and cannot be calibrated", problems)
        )


def _layers(
    source: WeightSource, names: Mapping[str, str], linear: Mapping[str, nn.Module]
) -> dict[str, Layer]:
    """The checkpoint's tensor of every layer, compared value by value."""
    layers: dict[str, Layer] = {}
    problems: list[str] = []
    for name, module in linear.items():
        tensor = names.get(f"{name}.weight")
        if tensor is None:
            problems.append(f"`{name}.weight` of the model has no counterpart in the checkpoint")
            continue
        weight = cast("Tensor", module.weight)
        stored = source.read(tensor)
        if stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
            problems.append(
                f"`{tensor}`, {tuple(stored.shape)}, differs from the model's `{name}.weight`, "
                f"{tuple(weight.shape)}"
            )
        layers[name] = Layer(tensor, transposed=isinstance(module, Conv1D))
    if problems:
        raise DeltaguardError(
            listed(f"transformers changes weights of {source.reference} while it loads them", problems)
        )
    return layers
