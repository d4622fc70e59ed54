"""What a step of a restore needs, read from disk while the step before is being solved."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from deltaguard.models.adapter import AdapterCheckpoint, ThinDelta
from deltaguard.models.checkpoint import WeightSource
from deltaguard.restoration.curvature import Curvature, CurvatureReader, Spectra
from deltaguard.restoration.plan import Step
from deltaguard.solvers.solution import is_finite

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Unchanged:
    """A layer without a delta."""

    step: Step


@dataclass(frozen=True)
class Thin:
    """A layer's delta as an adapter holds it, with the layer's curvature.

    Attributes:
        step: the step of the plan.
        delta: what the adapter adds.
        curvature: of the layer.
    """

    step: Step
    delta: ThinDelta
    curvature: Spectra


@dataclass(frozen=True)
class Inputs:
    """What one step needs, read from disk.

    Attributes:
        step: the step of the plan.
        finetuned: the fine-tuned tensor.
        aligned: the aligned tensor, None where the aligned model has none.
        differs: whether the two tensors differ; True where there is no aligned one.
        curvature: what the method needs, None where it needs none.
        thin: the delta as a product, where it will be projected and an adapter holds it as one.
    """

    step: Step
    finetuned: Tensor
    aligned: Tensor | None
    differs: bool
    curvature: Curvature | None
    thin: Thin | None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The aligned and the fine-tuned weight, each (out, in)."""
        aligned = self.aligned
        assert aligned is not None, "a tensor that is restored has an aligned counterpart"  # noqa: S101
        return (aligned.T, self.finetuned.T) if self.step.transposed else (aligned, self.finetuned)


LayerDelta = Inputs | Thin | Unchanged
"""What work on a layer's delta alone needs."""


def read_ahead(
    steps: Iterable[Step],
    aligned: WeightSource,
    finetuned: WeightSource,
    curvature: CurvatureReader | None,
) -> Iterator[Inputs]:
    """The inputs of each step, read in a thread while the step before is being solved.

    At most two steps' tensors are in memory at once.
    """
    return _ahead(steps, partial(_read_inputs, aligned, finetuned, curvature))


def read_deltas(
    steps: Iterable[Step],
    aligned: WeightSource,
    finetuned: WeightSource,
    curvature: CurvatureReader | None,
) -> Iterator[LayerDelta]:
    """As `read_ahead`, for work on deltas alone.

    Where an adapter holds a layer's delta as a product, or leaves the layer alone, and the method projects,
    no weight of that layer is read.
    """
    if curvature and curvature.gives_spectra and isinstance(finetuned, AdapterCheckpoint):
        return _ahead(steps, partial(_read_delta, aligned, finetuned, curvature))
    return read_ahead(steps, aligned, finetuned, curvature)


def _read_inputs(
    aligned: WeightSource, finetuned: WeightSource, curvature: CurvatureReader | None, step: Step
) -> Inputs:
    tuned = finetuned.read(step.info.name)
    base = aligned.read(step.aligned) if step.aligned else None
    differs = base is None or not _same(base, tuned)
    known = curvature.take(step, needed=differs) if curvature else None
    thin = None
    if isinstance(known, Spectra) and isinstance(finetuned, AdapterCheckpoint):
        delta = finetuned.thin_delta(step.info.name)
        thin = delta and Thin(step, delta, known)
    return Inputs(step, finetuned=tuned, aligned=base, differs=differs, curvature=known, thin=thin)


def _read_delta(
    aligned: WeightSource, finetuned: AdapterCheckpoint, curvature: CurvatureReader, step: Step
) -> LayerDelta:
    delta = finetuned.thin_delta(step.info.name)
    if delta is None and step.info.name in finetuned.adapted:
        return _read_inputs(aligned, finetuned, curvature, step)
    if delta is None or _adds_nothing(delta):
        curvature.take(step, needed=False)
        return Unchanged(step)
    known = curvature.take(step, needed=True)
    assert isinstance(known, Spectra), "a layer that is projected has both spectra"  # noqa: S101
    return Thin(step, delta, known)


def _adds_nothing(delta: ThinDelta) -> bool:
    """Whether one matrix is zero, and the other finite: zero times NaN is NaN."""
    zero = not (delta.up.any() and delta.down.any())
    return zero and is_finite(delta.up) and is_finite(delta.down)


def _ahead(steps: Iterable[Step], read: Callable[[Step], _Read]) -> Iterator[_Read]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        pending = None
        for step in steps:
            following = reader.submit(read, step)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _same(one: Tensor, other: Tensor) -> bool:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.to(dtype), other.to(dtype))
