"""Which linear layers a model has, which of them see the same input, and the sums over what passes them."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch
from deltaguard.curvature.contents import Group, Layer, Sums
from deltaguard.curvature.moments import Moment, accumulate
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource, name_map
from deltaguard.models.families import is_conv1d, is_linear, modules_in_blocks

_Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
_Add = Callable[[str, Tensor], None]

INPUT, OUTPUT = ".input", ".output"


@dataclass(frozen=True)
class Observed:
    """Layers that see the same input.

    Attributes:
        name: the first layer's name in the checkpoint.
        modules: the layers in the model; the input of the first is the input of all.
        in_features: size of the input.
        layers: the layers as the checkpoint names them, in the model's order.
    """

    name: str
    modules: tuple[nn.Module, ...]
    in_features: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Partial:
    """One sum over the first batches of a run."""

    moment: Moment
    batches: int


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
    inside = modules_in_blocks(model)
    linear = {name: m for name, m in inside.items() if is_linear(m)}
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
            modules=tuple(linear[name] for name in group),
            in_features=_in_features(linear[group[0]]),
            layers=tuple(layers[name] for name in group),
        )
        for group in groups
    ]
    return observed, tuple(sorted(names.get(name, name) for name in weights - covered))


def sum_sizes(observed: Sequence[Observed]) -> dict[str, int]:
    """The sums that calibration takes, and how many rows and columns each has."""
    sizes: dict[str, int] = {}
    for group in observed:
        sizes[group.name + INPUT] = group.in_features
        sizes |= {layer.name + OUTPUT: layer.out_features for layer in group.layers}
    return sizes


def take_sums(group: Group, partials: MutableMapping[str, Partial]) -> Sums:
    """The sums of one group, which the mapping gives up."""
    outputs = tuple(partials.pop(layer.name + OUTPUT).moment.total for layer in group.layers)
    return Sums(partials.pop(group.name + INPUT).moment, outputs)


class Accumulator:
    """Sums Σ x xᵀ over the inputs of every group and Σ g gᵀ over the output gradients of every layer.

    g is the gradient of the summed log-probability of response tokens that are drawn from the model itself,
    with respect to the layer's output at one token: E[Σ g gᵀ] is the layer's block of the Fisher information
    (Martens and Grosse 2015). One forward and one backward pass a batch; nothing of them is kept.

    A sum and the number of batches in it change together, so that the state is valid whenever a run is
    interrupted: a sum that has seen a batch already skips it.

    Attributes:
        partials: every sum by its name (see `sum_sizes`).
    """

    def __init__(self, model: Any, observed: Sequence[Observed], partials: Mapping[str, Partial]) -> None:
        self.partials = dict(partials)
        self._model = model
        self._observed = observed

    @property
    def batches(self) -> int:
        """How many batches all sums have seen."""
        return min(partial.batches for partial in self.partials.values())

    def add(self, number: int, batch: Batch) -> None:
        """Run a batch and add its tokens.

        Args:
            number: of the batch, counted from 0; the tokens drawn depend on it and on nothing else.
            batch: on the model's device.
        """
        chosen = batch.mask.flatten()

        def add(name: str, vectors: Tensor) -> None:
            known = self.partials[name]
            if known.batches == number:
                tokens = vectors.detach().reshape(-1, vectors.shape[-1])[chosen]
                self.partials[name] = Partial(accumulate(known.moment, tokens), number + 1)

        with ExitStack() as stack:
            stack.enter_context(_differentiable(self._model))
            for handle in self._hooks(add):
                stack.callback(handle.remove)
            logits = logits_at(self._model, batch.ids, batch.mask, batch.answering)
            drawn_likelihood(logits, seed=number).backward()

    def _hooks(self, add: _Add) -> Iterator[RemovableHandle]:
        for group in self._observed:
            yield group.modules[0].register_forward_pre_hook(_input_hook(group.name + INPUT, add))
            for layer, module in zip(group.layers, group.modules, strict=True):
                yield module.register_forward_hook(_gradient_hook(layer.name + OUTPUT, add))


def _input_hook(name: str, add: _Add) -> _Hook:
    return lambda _module, inputs: add(name, inputs[0])


def _gradient_hook(name: str, add: _Add) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def watch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def keep(gradient: Tensor) -> None:
            add(name, gradient)

        output.register_hook(keep)

    return watch


def drawn_likelihood(logits: Tensor, *, seed: int) -> Tensor:
    """The summed log-probability of one token drawn at each position, as a scalar to differentiate.

    Args:
        logits: (positions, vocabulary).
        seed: of the draw.

    Raises:
        DeltaguardError: a prediction is NaN.
    """
    scores = logits.float().log_softmax(-1)
    if bool(scores.isnan().any()):
        raise DeltaguardError(
            f"The aligned model predicts NaN or infinite values in {logits.dtype}: something overflows. "
            "Calibrate in float32 or bfloat16."
        )
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
    return scores.gather(-1, drawn).sum()


@contextmanager
def _differentiable(model: Any) -> Generator[None]:
    """Gradients flow from the embeddings on, though no parameter takes one."""

    def differentiate(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(differentiate)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


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


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1]


def _in_features(module: nn.Module) -> int:
    return cast("Tensor", module.weight).shape[0 if is_conv1d(module) else 1]


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
        layers[name] = Layer(tensor, is_conv1d(module), weight.numel() // _in_features(module))
    if problems:
        raise DeltaguardError(
            listed(f"transformers changes weights of {source.reference} while it loads them", problems)
        )
    return layers
