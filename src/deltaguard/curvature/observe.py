"""Find the linear layers of a model and which of them see the same input, and sum over what passes them."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from deltaguard.chat.conversations import Encoded
from deltaguard.chat.logits import logits_at
from deltaguard.curvature.sums import Layer, Moment, accumulate, empty_moment, input_name, output_name
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource, name_map
from deltaguard.models.loading import empty_model


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


def module_names(folder: Path) -> tuple[str, ...]:
    """List the modules of the causal language model that a checkpoint's configuration describes.

    Args:
        folder: of the checkpoint; its weights are not read.

    Raises:
        DeltaguardError: transformers cannot build the model.
    """
    return tuple(name for name, _ in empty_model(folder, str(folder)).named_modules())


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
    inside = _block_modules(model, decoder)
    linear = {name: m for name, m in inside.items() if isinstance(m, nn.Linear | Conv1D)}
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


@dataclass(frozen=True)
class Batch:
    """Conversations side by side, padded at the end.

    Attributes:
        ids: token ids, (conversations, tokens).
        mask: False for padding, the same shape.
        answering: True where the next token is one of the response, the same shape.
    """

    ids: Tensor
    mask: Tensor
    answering: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.answering.to(device))


def batches(texts: Sequence[Encoded], size: int) -> list[Batch]:
    """Conversations in batches, longest first: a run that does not fit into memory fails at its beginning."""
    ordered = sorted(texts, key=lambda text: len(text.ids), reverse=True)
    return [padded(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def padded(texts: Sequence[Encoded]) -> Batch:
    """Put conversations side by side, padded at the end, where a causal model does not see it."""
    shape = len(texts), max(len(text.ids) for text in texts)
    ids = torch.zeros(shape, dtype=torch.long)
    mask, answering = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        length = len(text.ids)
        ids[row, :length] = torch.tensor(text.ids)
        mask[row, :length] = True
        answering[row, text.prompt_length - 1 : length - 1] = True
    return Batch(ids, mask, answering)


class Accumulator:
    """Sums Σ x xᵀ over the inputs of every group and Σ g gᵀ over the output gradients of every layer.

    g is the gradient of the summed log-probability of response tokens that are drawn from the model itself,
    with respect to the layer's output at one token: E[Σ g gᵀ] is the layer's block of the Fisher information
    (Martens and Grosse 2015). One forward and one backward pass a batch; nothing of them is kept.

    Attributes:
        sums: by the names of the matrices (see `Group.matrices`).
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

        with ExitStack() as stack:
            stack.enter_context(_differentiable(self._model))
            for handle in self._hooks(add):
                stack.callback(handle.remove)
            logits = logits_at(self._model, batch.ids, batch.mask, batch.answering)
            drawn_likelihood(logits, seed=number).backward()

    def _hooks(self, add: Callable[[str, Tensor], None]) -> Iterator[RemovableHandle]:
        def inputs_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, inputs: add(name, inputs[0])

        def gradients_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def watch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
                output.register_hook(lambda gradient: add(name, gradient))

            return watch

        for group in self._observed:
            yield group.modules[0].register_forward_pre_hook(inputs_of(input_name(group.name)))
            for layer, module in zip(group.layers, group.modules, strict=True):
                yield module.register_forward_hook(gradients_of(output_name(layer)))


@contextmanager
def _differentiable(model: Any) -> Generator[None]:
    """Let gradients flow from the embeddings on, though no parameter takes one."""

    def differentiate(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(differentiate)
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


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


def _block_modules(model: Any, decoder: nn.Module) -> dict[str, nn.Module]:
    """Find the decoder's modules inside a list of blocks, by their names in the model."""
    mine = set(decoder.modules())
    named = {name: module for name, module in model.named_modules() if module in mine}
    lists = tuple(f"{name}." for name, module in named.items() if isinstance(module, nn.ModuleList))
    return {name: module for name, module in named.items() if name.startswith(lists)}


def _in_features(module: nn.Module) -> int:
    return cast("Tensor", module.weight).shape[0 if isinstance(module, Conv1D) else 1]


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
) -> dict[str, Layer]:
    """Find the checkpoint's tensor of every layer, and compare it value by value."""
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
        layers[name] = Layer(tensor, isinstance(module, Conv1D), weight.numel() // _in_features(module))
    if problems:
        raise DeltaguardError(
            listed(f"transformers changes weights of {source.reference} while it loads them", problems)
        )
    return layers
