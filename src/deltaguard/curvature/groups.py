"""Find the linear layers of a model, experts among them, and which of them see the same input."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from deltaguard.curvature.blocks import Call, CutModel
from deltaguard.curvature.experts import Matrix, computes_the_same, is_experts, is_stored_in_out
from deltaguard.curvature.sums import LayerGroup, LinearLayer
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.experts import Part, Stack, parts_of
from deltaguard.models.families import is_conv1d, is_linear, is_router, modules_in_blocks, product_of

Parts = Mapping[str, Sequence[Part]]
"""The model's parameters, and the tensors of the checkpoint that give their values."""


@dataclass(frozen=True)
class Observed:
    """Layers that see the same input.

    Attributes:
        name: the first layer's name in the checkpoint.
        modules: the layers in the model; the input of the first is the input of all.
        in_features: size of the input.
        layers: the layers as the checkpoint names them, in the model's order.
        matrix: of an expert, what the layers are in its module of experts, the only one of `modules`.
    """

    name: str
    modules: tuple[nn.Module, ...]
    in_features: int
    layers: tuple[LinearLayer, ...]
    matrix: Matrix | None = None


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
            some, or they see something other than one row per token, or experts cannot be watched. All are
            listed.
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
    parts = parts_of(sorted(_matrices(inside)), source.tensors)
    _require_unchanged(source, parts, {path: inside[path] for group in groups for path in group})
    return list(_observed(inside, groups, parts)), _uncovered(inside, groups, parts)


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
    return list(_observed(inside, groups, cut.parts)), _uncovered(inside, groups, cut.parts)


def observed_again(cut: CutModel, groups: Sequence[LayerGroup]) -> list[Observed]:
    """Find the modules of groups that `observe_block` has found before."""
    places = {part.tensor: (name, part) for name, parts in cut.parts.items() for part in parts}
    found: list[Observed] = []
    for group in groups:
        names = [places[layer.tensor][0].rpartition(".")[::2] for layer in group.layers]
        modules = tuple(cut.model.get_submodule(path) for path, _ in names)
        matrix, (first, *_) = None, group.layers
        if is_experts(modules[0]):
            expert = places[first.tensor][1].expert if first.expert is None else first.expert
            assert expert is not None, "a stack is one of its parts or as a whole"  # noqa: S101
            modules, matrix = modules[:1], Matrix(cast("Stack", names[0][1]), expert)
        found.append(Observed(group.name, modules, group.in_features, group.layers, matrix))
    return found


def _in_features(module: nn.Module) -> int:
    return cast("Tensor", module.weight).shape[0 if is_conv1d(module) else 1]


def _matrices(inside: Mapping[str, nn.Module]) -> set[str]:
    """Name the matrices, and stacks of them, among the parameters of modules."""
    return {
        f"{name}.{key}"
        for name, module in inside.items()
        for key, parameter in module.named_parameters(recurse=False)
        # Biases of experts are stacked, too.
        if parameter.ndim > 1 and not key.endswith("bias")
    }


def _watched(path: str, module: nn.Module) -> list[str]:
    """Name the parameters of a module that layers are made of."""
    return [f"{path}.{key}" for key in (get_args(Stack) if is_experts(module) else ("weight",))]


def _observed(
    inside: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], parts: Parts
) -> Iterator[Observed]:
    for group in groups:
        modules = tuple(inside[path] for path in group)
        if is_experts(modules[0]):
            yield from _of_experts(group[0], modules[0], parts)
            continue
        layers = tuple(_layer(parts[f"{path}.weight"][0].tensor, inside[path]) for path in group)
        yield Observed(layers[0].name, modules, _in_features(modules[0]), layers)


def _of_experts(path: str, module: nn.Module, parts: Parts) -> Iterator[Observed]:
    turned = is_stored_in_out(module)
    for expert in range(len(module.get_parameter("down_proj"))):
        for stack in get_args(Stack):
            parameter = module.get_parameter(stack)
            own = [part for part in parts[f"{path}.{stack}"] if part.expert in (None, expert)]
            layers = tuple(
                LinearLayer(part.tensor, turned, parameter.shape[2 if turned else 1], expert)
                if part.expert is None
                else LinearLayer(part.tensor, transposed=False, out_features=len(part.of(parameter)))
                for part in own
            )
            size = parameter.shape[1 if turned else 2]
            yield Observed(layers[0].name, (module,), size, layers, Matrix(stack, expert))


def _uncovered(
    inside: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], parts: Parts
) -> tuple[str, ...]:
    covered = {name for group in groups for path in group for name in _watched(path, inside[path])}
    left = _matrices(inside) - covered
    return tuple(sorted(part.tensor for name in left for part in parts.get(name, (Part(name),))))


@torch.no_grad()
def _shared_inputs(inside: Mapping[str, nn.Module], run: Callable[[], object], rows: int) -> list[list[str]]:
    """Run the linear layers among modules on some rows, and put together those that get the same tensor.

    A module of experts is by itself.
    """
    # The tensors are kept until the end, since the id of one that is gone may be given to another.
    seen: list[tuple[str, tuple[Tensor, ...], Any]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        return lambda _module, inputs, output: seen.append((name, inputs, output))

    with ExitStack() as stack:
        for name, module in inside.items():
            if is_linear(module) or is_experts(module):
                stack.callback(module.register_forward_hook(hook(name)).remove)
        run()
    calls = Counter(name for name, *_ in seen)
    problems = [f"`{name}` is used {count} times in one pass" for name, count in calls.items() if count > 1]
    groups: dict[int, list[str]] = {}
    for number, (name, given, made) in enumerate(seen):
        module = inside[name]
        if is_experts(module):
            if not computes_the_same(module, given, made):
                problems.append(f"`{name}` ({type(module).__name__}) computes something else than is known")
            groups[-1 - number] = [name]
            continue
        found = given[0].numel() // given[0].shape[-1]
        if found != rows:
            problems.append(f"`{name}` sees {found} rows for {rows} tokens")
        elif is_router(module) and not _multiplies(module, given[0], product_of(module, made)):
            problems.append(f"`{name}` ({type(module).__name__}) puts out something else than is known")
        groups.setdefault(id(given[0]), []).append(name)
    if problems:
        raise DeltaguardError(
            listed("Every layer must see each token once; these do not, and cannot be calibrated", problems)
        )
    return list(groups.values())


def _multiplies(router: nn.Module, given: Tensor, made: Tensor) -> bool:
    weight, bias = router.get_parameter("weight"), getattr(router, "bias", None)
    expected = nn.functional.linear(given.reshape(-1, given.shape[-1]).to(weight.dtype), weight, bias)
    return expected.shape == made.shape and torch.allclose(expected.float(), made.float(), 0.05, 0.05)


def _require_unchanged(source: WeightSource, parts: Parts, modules: Mapping[str, nn.Module]) -> None:
    """Compare every layer with the checkpoint's tensors, value by value.

    Raises:
        DeltaguardError: tensors are absent or differ.
    """
    problems: list[str] = []
    for path, module in modules.items():
        for name in _watched(path, module):
            parameter, known = module.get_parameter(name.rpartition(".")[2]), parts.get(name, ())
            if sum(part.of(parameter).numel() for part in known) != parameter.numel():
                problems.append(f"`{name}` of the model has no counterpart in the checkpoint")
            for part in known:
                stored, weight = source.read(part.tensor), part.of(parameter)
                if stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
                    problems.append(
                        f"`{part.tensor}`, {tuple(stored.shape)}, differs from the model's `{name}`, "
                        f"{tuple(weight.shape)}"
                    )
    if problems:
        raise DeltaguardError(
            listed(f"transformers changes weights of {source.reference} while it loads them", problems)
        )


def _layer(tensor: str, module: nn.Module) -> LinearLayer:
    weight = cast("Tensor", module.weight)
    return LinearLayer(tensor, is_conv1d(module), weight.numel() // _in_features(module))
