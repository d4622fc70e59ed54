"""Curvature of every layer in eigenbases, from sums, and what is left of it when parts are thrown away."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.experiments.sums import Totals
from deltaguard.curvature.observe import Observed
from deltaguard.restoration.curvature import Spectra
from deltaguard.solvers import Spectrum, scaled_identity, spectrum

_HEAD = 64
"""Rows of a block: the size of an attention head of SmolLM2."""

Decompose = Callable[[Tensor], Spectrum]


def curvatures(
    observed: Sequence[Observed],
    totals: Totals,
    *,
    outputs: Decompose | None = None,
    inputs: Mapping[str, Spectrum] | None = None,
) -> dict[str, Spectra]:
    """H and G of every layer, by the name of its weight.

    Args:
        observed: the groups of layers.
        totals: the sums.
        outputs: how G is decomposed; wholly where absent.
        inputs: decomposed H by group, where it is known already.
    """
    found: dict[str, Spectra] = {}
    for group in observed:
        h = inputs[group.name] if inputs else whole(totals.inputs[group.name] / totals.tokens)
        for layer in group.layers:
            g = totals.outputs[layer.tensor] / totals.responses
            found[layer.tensor] = Spectra(h, (outputs or whole)(g))
    return found


def input_spectra(observed: Sequence[Observed], found: Mapping[str, Spectra]) -> dict[str, Spectrum]:
    """The decomposed H of every group, to be used again."""
    return {group.name: found[group.layers[0].tensor].inputs for group in observed}


def whole(matrix: Tensor) -> Spectrum:
    """All eigenpairs, none of them free."""
    return spectrum((matrix + matrix.T) / 2).floored()


def diagonal(matrix: Tensor) -> Spectrum:
    """Its diagonal alone."""
    values, order = matrix.diagonal().sort(descending=True)
    return Spectrum(values.clone(), torch.eye(len(values))[:, order], 0.0).floored()


def trace(matrix: Tensor) -> Spectrum:
    """Its mean eigenvalue alone, which `ridge` uses."""
    return scaled_identity(len(matrix), float(matrix.diagonal().mean()), like=matrix)


def blocks(matrix: Tensor) -> Spectrum:
    """Its blocks of the size of an attention head."""
    values, vectors = torch.linalg.eigh(
        torch.stack([matrix[i : i + _HEAD, i : i + _HEAD] for i in range(0, len(matrix), _HEAD)])
    )
    flat, order = values.flatten().clamp_min(0).sort(descending=True)
    return Spectrum(flat, torch.block_diag(*vectors)[:, order], 0.0).floored()


def stored(share: float) -> Decompose:
    """As a store keeps it, but for rounding: some largest eigenpairs, the geometric mean of the others."""
    return lambda matrix: spectrum((matrix + matrix.T) / 2, max(1, int(share * len(matrix))))


def with_tail(found: Spectrum, whole: Spectrum, *, arithmetic: bool) -> Spectrum:
    """A cut-off spectrum whose tail is the mean of the others, so that the trace is kept, or else zero."""
    others = whole.values[len(found.values) :]
    return replace(found, tail=float(others.double().mean()) if arithmetic else 0.0)


def weighted(found: Mapping[str, Spectra], weights: Mapping[str, float]) -> dict[str, Spectra]:
    """The same with each layer's G multiplied by a number."""
    return {
        name: replace(
            each,
            outputs=Spectrum(
                each.outputs.values * weights[name], each.outputs.vectors, each.outputs.tail * weights[name]
            ),
        )
        for name, each in found.items()
    }
