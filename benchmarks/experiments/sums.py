"""The sums that calibration takes, in other ways too, over parts of the conversations."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch
from deltaguard.curvature.observe import Observed, drawn_likelihood

Objective = Callable[[Tensor, Tensor, int], Tensor]
"""From logits (positions, vocabulary), the response's own tokens and a seed to what is differentiated."""


@dataclass
class Totals:
    """Sums over some conversations.

    Attributes:
        inputs: Σ x xᵀ by group.
        outputs: Σ g gᵀ by layer.
        tokens: how many tokens there are in `inputs`.
        responses: how many tokens of responses.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    tokens: int = 0
    responses: int = 0

    def save(self, path: Path) -> None:
        """Write to a file."""
        named = {f"input {name}": matrix for name, matrix in self.inputs.items()}
        named |= {f"output {name}": matrix for name, matrix in self.outputs.items()}
        counts = {"tokens": str(self.tokens), "responses": str(self.responses)}
        save_file(named, path, metadata=counts)

    @classmethod
    def load(cls, path: Path) -> "Totals":
        """Read what `save` wrote."""
        found = cls()
        with safe_open(path, "pt") as file:
            counts = file.metadata()
            found.tokens, found.responses = int(counts["tokens"]), int(counts["responses"])
            for key in file.keys():  # noqa: SIM118  # no mapping
                kind, name = key.split(" ")
                sums = found.inputs if kind == "input" else found.outputs
                sums[name] = file.get_tensor(key)
        return found

    def add(self, other: "Totals") -> None:
        """Add the sums over other conversations."""
        self.tokens += other.tokens
        self.responses += other.responses
        for own, added in ((self.inputs, other.inputs), (self.outputs, other.outputs)):
            for name, matrix in added.items():
                own[name].add_(matrix)


def total(parts: Iterable[Path]) -> Totals:
    """Sums over several parts together."""
    first, *others = parts
    found = Totals.load(first)
    for part in others:
        found.add(Totals.load(part))
    return found


def sampled(logits: Tensor, _own: Tensor, seed: int) -> Tensor:
    """Tokens drawn from the model, as `calibrate` does."""
    return drawn_likelihood(logits, seed=seed)


def own(logits: Tensor, own_tokens: Tensor, _seed: int) -> Tensor:
    """The tokens that the model did answer with (the empirical Fisher information)."""
    return logits.float().log_softmax(-1).gather(-1, own_tokens[:, None]).sum()


def softmax(logits: Tensor, _own: Tensor, seed: int) -> Tensor:
    """A random projection of each position's whole softmax curvature, diag(p) - p pᵀ."""
    probabilities = logits.detach().float().softmax(-1)
    generator = torch.Generator(logits.device).manual_seed(seed)
    signs = torch.randint(0, 2, probabilities.shape, generator=generator, device=logits.device) * 2.0 - 1
    roots = probabilities.sqrt() * signs
    return (logits.float() * (roots - probabilities * roots.sum(-1, keepdim=True))).sum()


def measure_sums(
    model: Any,
    observed: Sequence[Observed],
    batches: Sequence[Batch],
    objective: Objective,
    *,
    answers_only: bool = False,
) -> Totals:
    """Run batches through a model, forward and backward.

    Args:
        model: a transformers causal language model whose parameters take no gradient.
        observed: its groups of layers.
        batches: the conversations.
        objective: what is differentiated.
        answers_only: sum inputs over the positions that predict a token of the response alone.
    """
    found = Totals()
    for number, batch in enumerate(batches):
        seen = batch.answering if answers_only else batch.mask
        with ExitStack() as stack, torch.enable_grad():
            for handle in _hooks(model, observed, found, seen.flatten()):
                stack.callback(handle.remove)
            logits = logits_at(model, batch.ids, batch.mask, batch.answering)
            own_tokens = batch.ids[:, 1:][batch.answering[:, :-1]]
            objective(logits, own_tokens, number).backward()
        found.tokens += int(seen.sum())
        found.responses += int(batch.answering.sum())
    return found


def _hooks(model: Any, observed: Sequence[Observed], found: Totals, seen: Tensor) -> list[Any]:
    def see(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: _add(found.inputs, group, inputs[0].detach().flatten(0, -2)[seen])

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # Gradients at padding are zero.
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda gradient: _add(found.outputs, layer, gradient.flatten(0, -2)))

        return hook

    embeddings = model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_())]
    for group in observed:
        handles.append(group.modules[0].register_forward_pre_hook(see(group.name)))
        for layer, module in zip(group.layers, group.modules, strict=True):
            handles.append(module.register_forward_hook(watch(layer.tensor)))
    return handles


def _add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    if name in sums:
        sums[name].addmm_(rows.T, rows)
    else:
        sums[name] = rows.T @ rows
