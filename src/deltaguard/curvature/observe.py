"""Find the linear layers of a model and which of them see the same input, and sum over what passes them."""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch
from deltaguard.curvature.blocks import Call, CutModel
from deltaguard.curvature.sums import LayerGroup, LinearLayer, RunningMoment, input_name, output_name
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
    text = torch.tensor([ids], device=next(model.parameters()).device)

    def run() -> None:
        model.get_decoder()(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False)

    inside = modules_in_blocks(model)
    groups = _shared_inputs(inside, run, len(ids))
    if not groups:
        raise DeltaguardError(
            f"{source.reference} ({type(model).__name__}) has no linear layer inside a list of decoder "
            "blocks: there is nothing to calibrate."
        )
    names = name_map(sorted(_matrices(inside)), source.tensors)
    layers = _layers(source, names, {name: inside[name] for group in groups for name in group})
    return _observed(inside, groups, layers), _uncovered(inside, layers, names)


def observe_block(
    cut: CutModel, number: int, hidden: Tensor, call: Call
) -> tuple[list[Observed], tuple[str, ...]]:
    """Find the linear layers of one block that is loaded, like `observe`.

    Args:
        cut: the model.
        number: of the block.
        hidden: what goes into it, (conversations, tokens, hidden).
        call: what it is given beside.

    Raises:
        DeltaguardError: as `observe`.
    """
    prefix = f"{cut.prefix}{number}."
    inside = {f"{prefix}{name}": module for name, module in cut.blocks[number].named_modules() if name}
    groups = _shared_inputs(inside, lambda: cut.run(number, hidden, call), hidden.shape[:-1].numel())
    layers = {name: _layer(cut.names[f"{name}.weight"], inside[name]) for group in groups for name in group}
    return _observed(inside, groups, layers), _uncovered(inside, layers, cut.names)


def observed_again(cut: CutModel, groups: Sequence[LayerGroup]) -> list[Observed]:
    """Find the modules of groups that `observe_block` has found before."""
    modules = {tensor: cut.model.get_submodule(name.rpartition(".")[0]) for name, tensor in cut.names.items()}
    return [
        Observed(g.name, tuple(modules[layer.tensor] for layer in g.layers), g.in_features, g.layers)
        for g in groups
    ]


class Accumulator:
    """Sums Σ x xᵀ over the inputs of every group and Σ g gᵀ over the output gradients of every layer.

    g is the gradient of the summed log-probability of response tokens that are drawn from the model itself,
    with respect to the layer's output at one token: E[Σ g gᵀ] is the layer's block of the Fisher information
    (Martens and Grosse 2015). One forward and one backward pass a batch; nothing of them is kept.

    Attributes:
        sums: by the names of the matrices (see `LayerGroup.matrices`).
    """

    def __init__(self, model: Any, observed: Sequence[Observed]) -> None:
        self.sums = running_sums(observed, model.device)
        self._model = model
        self._observed = observed

    def add(self, number: int, batch: Batch) -> None:
        """Run a batch and add its tokens.

        Args:
            number: of the batch, counted from 0; the tokens drawn depend on it and on nothing else.
            batch: on the model's device.
        """

        def differentiate(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            """Let gradients flow from the embeddings on, though no parameter takes one."""
            return output.requires_grad_()

        with torch.enable_grad(), watched(self._observed, self.sums, batch.mask), ExitStack() as stack:
            embeddings = self._model.get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(differentiate).remove)
            logits = logits_at(self._model, batch.ids, batch.mask, batch.answering)
            drawn_likelihood(logits, seed=number).backward()


def running_sums(observed: Sequence[Observed], device: torch.device) -> dict[str, RunningMoment]:
    """Make empty sums for what is observed, by the names of the matrices (see `LayerGroup.matrices`)."""
    sums: dict[str, RunningMoment] = {}
    for group in observed:
        sums[input_name(group.name)] = RunningMoment(group.in_features, device=device)
        for layer in group.layers:
            sums[output_name(layer)] = RunningMoment(layer.out_features, device=device)
    return sums


@contextmanager
def watched(observed: Sequence[Observed], sums: Mapping[str, RunningMoment], mask: Tensor) -> Generator[None]:
    """Add the inputs of layers, and the gradients of their outputs, as they are run and differentiated.

    Args:
        observed: the layers.
        sums: what is added to, from `running_sums`.
        mask: False for padding, (conversations, tokens).
    """
    chosen = mask.flatten()

    def add(name: str, vectors: Tensor) -> None:
        sums[name].add(vectors.detach().reshape(-1, vectors.shape[-1])[chosen])

    def inputs_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: add(name, inputs[0])

    def gradients_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda gradient: add(name, gradient))

        return watch

    with ExitStack() as stack:
        for group in observed:
            hook = inputs_of(input_name(group.name))
            stack.callback(group.modules[0].register_forward_pre_hook(hook).remove)
            for layer, module in zip(group.layers, group.modules, strict=True):
                stack.callback(module.register_forward_hook(gradients_of(output_name(layer))).remove)
        yield


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


def _matrices(inside: Mapping[str, nn.Module]) -> set[str]:
    """Name the matrices among the parameters of modules."""
    return {
        f"{name}.{key}"
        for name, module in inside.items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }


def _observed(
    inside: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], layers: Mapping[str, LinearLayer]
) -> list[Observed]:
    return [
        Observed(
            name=layers[group[0]].name,
            modules=tuple(inside[name] for name in group),
            in_features=_in_features(inside[group[0]]),
            layers=tuple(layers[name] for name in group),
        )
        for group in groups
    ]


def _uncovered(
    inside: Mapping[str, nn.Module], layers: Mapping[str, LinearLayer], names: Mapping[str, str]
) -> tuple[str, ...]:
    left = _matrices(inside) - {f"{name}.weight" for name in layers}
    return tuple(sorted(names.get(name, name) for name in left))


@torch.no_grad()
def _shared_inputs(inside: Mapping[str, nn.Module], run: Callable[[], object], rows: int) -> list[list[str]]:
    """Run the linear layers among modules on some rows, and put together those that get the same tensor."""
    # The tensors are kept until the end, since the id of one that is gone may be given to another.
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.append((name, inputs[0]))

    with ExitStack() as stack:
        for name, module in inside.items():
            if is_linear(module):
                stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        run()
    calls = Counter(name for name, _ in seen)
    problems = [f"`{name}` is used {count} times in one pass" for name, count in calls.items() if count > 1]
    groups: dict[int, list[str]] = {}
    for name, tensor in seen:
        found = tensor.numel() // tensor.shape[-1]
        if found != rows:
            problems.append(f"`{name}` sees {found} rows for {rows} tokens")
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
        layers[name] = _layer(tensor, module)
    if problems:
        raise DeltaguardError(
            listed(f"transformers changes weights of {source.reference} while it loads them", problems)
        )
    return layers


def _layer(tensor: str, module: nn.Module) -> LinearLayer:
    weight = cast("Tensor", module.weight)
    return LinearLayer(tensor, is_conv1d(module), weight.numel() // _in_features(module))
