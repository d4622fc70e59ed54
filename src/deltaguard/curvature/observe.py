"""Find the linear layers of a model and which of them see the same input, and sum over what passes them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch
from deltaguard.curvature.sums import LinearLayer, Moment, accumulate, empty_moment, input_name, output_name
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource, name_map
from deltaguard.models.families import is_conv1d, is_linear, modules_in_blocks


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
    layers: tuple[LinearLayer, ...]


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
        DeltaguardError: there are no such layers, or the checkpoint has no tensor of the same values for
            some, or they see something other than one row per token. All are listed.
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
    weights = {
        f"{name}.{key}"
        for name, module in inside.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
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


class Accumulator:
    """Sums Σ x xᵀ over the inputs of every group and Σ g gᵀ over the output gradients of every layer.

    g is the gradient of the summed log-probability of response tokens that are drawn from the model itself,
    with respect to the layer's output at one token: E[Σ g gᵀ] is the layer's block of the Fisher information
    (Martens and Grosse 2015). One forward and one backward pass a batch; nothing of them is kept.

    Attributes:
        sums: by the names of the matrices (see `LayerGroup.matrices`).
    """

    def __init__(self, model: Any, observed: Sequence[Observed]) -> None:
        self.sums: dict[str, Moment] = {}
        self._model = model
        self._observed = observed
        for group in observed:
            self.sums[input_name(group.name)] = empty_moment(group.in_features, device=model.device)
            for layer in group.layers:
                self.sums[output_name(layer)] = empty_moment(layer.out_features, device=model.device)

    def add(self, number: int, batch: Batch) -> None:
        """Run a batch and add its tokens.

        Args:
            number: of the batch, counted from 0; the tokens drawn depend on it and on nothing else.
            batch: on the model's device.
        """
        chosen = batch.mask.flatten()

        def add(name: str, vectors: Tensor) -> None:
            tokens = vectors.detach().reshape(-1, vectors.shape[-1])[chosen]
            self.sums[name] = accumulate(self.sums[name], tokens)

        with torch.enable_grad(), ExitStack() as stack:
            for handle in self._hooks(add):
                stack.callback(handle.remove)
            logits = logits_at(self._model, batch.ids, batch.mask, batch.answering)
            drawn_likelihood(logits, seed=number).backward()

    def _hooks(self, add: Callable[[str, Tensor], None]) -> Iterator[RemovableHandle]:
        """Watch all layers, and let gradients flow from the embeddings on, though no parameter takes one."""

        def differentiate(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.requires_grad_()

        def inputs_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, inputs: add(name, inputs[0])

        def gradients_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def watch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
                output.register_hook(lambda gradient: add(name, gradient))

            return watch

        yield self._model.get_input_embeddings().register_forward_hook(differentiate)
        for group in self._observed:
            yield group.modules[0].register_forward_pre_hook(inputs_of(input_name(group.name)))
            for layer, module in zip(group.layers, group.modules, strict=True):
                yield module.register_forward_hook(gradients_of(output_name(layer)))


def drawn_likelihood(logits: Tensor, *, seed: int) -> Tensor:
    """Sum the log-probability of one token drawn at each position, as a scalar to differentiate.

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


def _in_features(module: nn.Module) -> int:
    return cast("Tensor", module.weight).shape[0 if is_conv1d(module) else 1]


@torch.no_grad()
def _shared_inputs(decoder: Any, linear: Mapping[str, nn.Module], ids: Sequence[int]) -> list[list[str]]:
    """Run a text, and put layers together that received the same tensor object."""
    # The tensors are kept until the end, since the id of one that is gone may be given to another.
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.append((name, inputs[0]))

    text = torch.tensor([ids], device=next(decoder.parameters()).device)
    with ExitStack() as stack:
        for name, module in linear.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        decoder(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False)
    calls = Counter(name for name, _ in seen)
    problems = [f"`{name}` is used {count} times in one pass" for name, count in calls.items() if count > 1]
    groups: dict[int, list[str]] = {}
    for name, tensor in seen:
        rows = tensor.numel() // tensor.shape[-1]
        if rows != len(ids):
            problems.append(f"`{name}` sees {rows} rows for {len(ids)} tokens")
        groups.setdefault(id(tensor), []).append(name)
    if problems:
        raise DeltaguardError(
            listed("Every layer must see each token once; these do not, and cannot be calibrated", problems)
        )
    return list(groups.values())


def _layers(
    source: WeightSource, names: Mapping[str, str], linear: Mapping[str, nn.Module]
) -> dict[str, LinearLayer]:
    """Find the checkpoint's tensor of every layer, and compare it value by value."""
    layers: dict[str, LinearLayer] = {}
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
        layers[name] = LinearLayer(tensor, is_conv1d(module), weight.numel() // _in_features(module))
    if problems:
        raise DeltaguardError(
            listed(f"transformers changes weights of {source.reference} while it loads them", problems)
        )
    return layers
