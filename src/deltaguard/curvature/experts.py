"""Watch the experts of a block: run one after the other, so that what each is given and puts out is seen.

transformers multiplies all experts of a block at once, and nothing of one of them passes a module. While they
are watched, `run_experts` stands for a module of experts; whether it computes the same is tried out first.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaguard.models.experts import Stack

_DIFFERENCE = 0.05
"""Of two ways to compute the same, relative to its norm: rounding to bfloat16 makes a tenth of it."""


class Matrix(NamedTuple):
    """One matrix of a module of experts."""

    stack: Stack
    expert: int


Watch = Callable[[Matrix, Tensor, Tensor, Tensor], None]
"""Is given a matrix, the numbers of the tokens that reach it, its inputs and its outputs for these."""


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds stacks of experts that deltaguard can run."""
    stacks = [getattr(module, name, None) for name in Stack.__args__]
    return all(isinstance(each, nn.Parameter) and each.ndim == 3 for each in stacks)


def is_stored_in_out(module: nn.Module) -> bool:
    """Tell whether a module of experts has its matrices as (in, out), as Llama 4 does."""
    # Modules without this attribute get tokens of all experts in turn and multiply them from the left.
    return bool(getattr(module, "is_transposed", True))


def run_experts(module: Any, watch: Watch, hidden: Tensor, *routing: Tensor) -> Tensor:
    """Compute what a module of experts computes, one expert after the other.

    Args:
        module: of transformers, see `is_experts`.
        watch: told of every product.
        hidden: (tokens, hidden); without routing the tokens of each expert in turn, zeros where a token is
            not routed to it, as Llama 4 has it.
        routing: the experts of each token, (tokens, experts of a token), and their weights.

    Returns:
        As `hidden`.
    """
    result = torch.zeros_like(hidden)
    if not routing:
        by_expert = hidden.reshape(len(module.gate_up_proj), -1, hidden.shape[-1])
        for expert, given in enumerate(by_expert):
            (tokens,) = torch.where(given.detach().any(-1))
            rows = tokens + expert * by_expert.shape[1]
            result.index_add_(0, rows, _run_expert(module, watch, expert, tokens, given[tokens]))
        return result
    chosen, weights = routing
    for expert in range(len(module.gate_up_proj)):
        tokens, places = torch.where(chosen == expert)
        found = _run_expert(module, watch, expert, tokens, hidden[tokens])
        result.index_add_(0, tokens, (found * weights[tokens, places, None]).to(result.dtype))
    return result


def _run_expert(module: Any, watch: Watch, expert: int, tokens: Tensor, hidden: Tensor) -> Tensor:
    projected = _product(module, Matrix("gate_up_proj", expert), hidden)
    watch(Matrix("gate_up_proj", expert), tokens, hidden, projected)
    if hasattr(module, "_apply_gate"):
        gated = module._apply_gate(projected)  # noqa: SLF001  # as transformers does
    else:
        gate, up = projected.chunk(2, dim=-1)
        gated = up * module.act_fn(gate)
    found = _product(module, Matrix("down_proj", expert), gated)
    watch(Matrix("down_proj", expert), tokens, gated, found)
    return found


def _product(module: Any, matrix: Matrix, vectors: Tensor) -> Tensor:
    weight = getattr(module, matrix.stack)[matrix.expert]
    found = vectors @ (weight if is_stored_in_out(module) else weight.T)
    bias = getattr(module, f"{matrix.stack}_bias", None)
    return found if bias is None else found + bias[matrix.expert]


@contextmanager
def watched_experts(modules: Mapping[nn.Module, Watch]) -> Generator[None]:
    """Run modules of experts so that they are watched, as long as the context lasts."""
    for module, watch in modules.items():
        module.forward = partial(run_experts, module, watch)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def computes_the_same(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> bool:
    """Tell whether `run_experts` computes what a module made of what it was given."""
    found = run_experts(module, lambda *_: None, *given)
    return float((found - made).norm()) <= _DIFFERENCE * float(made.norm())
