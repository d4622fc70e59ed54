"""What each step of a restore needs, read from disk while the step before is being solved."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import numbered
from deltaguard.methods.method import Curvature, Layer, Method, Role
from deltaguard.models.adapter import AdapterCheckpoint, ThinDelta
from deltaguard.restoration.job import Job
from deltaguard.restoration.kept import map_tensors
from deltaguard.restoration.plan import Action, Step
from deltaguard.solvers.solution import is_finite

_T = TypeVar("_T")


@dataclass(frozen=True)
class Inputs:
    """What one step needs.

    Attributes:
        step: the step of the plan.
        finetuned: the fine-tuned tensor; None where no weight was asked for.
        aligned: the aligned tensor; likewise, and where the aligned model has none.
        differs: whether the two tensors differ; True where there is no aligned one.
        layers: what the method is given: a layer, of a stack one for each matrix; none of a step that no
            method decides. None stands for one that has no delta where the method leaves such alone.
    """

    step: Step
    finetuned: Tensor | None
    aligned: Tensor | None
    differs: bool
    layers: tuple[Layer | None, ...]

    @property
    def weight(self) -> Tensor:
        """The fine-tuned tensor of a step that was read with its weights."""
        assert self.finetuned is not None, "read with its weights"  # noqa: S101
        return self.finetuned


def read_layers(
    job: Job,
    method: Method,
    steps: Sequence[Step],
    *,
    device: torch.device,
    with_weights: bool = True,
) -> Iterator[Inputs]:
    """Read what steps need, one step ahead of its use.

    At most two steps' tensors are in memory at once, and of the curvature what layers share, for as long as
    one of them is still to come.

    Args:
        job: the models and the store.
        method: decides what is read of the curvature.
        steps: in the order wanted.
        device: that all of a `Layer` is taken to; everything else stays on the CPU.
        with_weights: False leaves weights unread where the method works on the delta alone and an adapter
            holds it as a product, or leaves the layer as it is.
    """
    uses = Counter(group for step in steps for group in step.groups)
    # Another thread reads.
    reader = _Reader(job, method, uses, numbered(device), with_weights)
    return read_ahead(steps, reader.read)


def read_ahead(steps: Iterable[_T], read: Callable[[_T], Any]) -> Iterator[Any]:
    """Read in a thread what is needed next."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        pending = None
        for step in steps:
            following = reader.submit(read, step)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


@dataclass
class _Reader:
    job: Job
    method: Method
    uses: Counter[str]
    device: torch.device
    with_weights: bool
    _shared: dict[str, Curvature] = field(default_factory=dict[str, Curvature])

    def read(self, step: Step) -> Inputs:
        tuned, restored = self.job.finetuned, step.action is Action.RESTORE
        product = None
        if restored and isinstance(tuned, AdapterCheckpoint) and self.method.from_products:
            product = tuned.thin_delta(step.info.name)
            whole = product is None and step.info.name in tuned.adapted
            if not self.with_weights and not whole:
                differs = product is not None and not _adds_nothing(product)
                curvature, *_ = self._curvatures(step, needed=differs)
                layer = Layer(None, None, self._pair(product), curvature=curvature)
                return Inputs(step, None, None, differs, (layer,) if differs else ())
        aligned = self.job.aligned.read(step.aligned) if step.aligned else None
        if aligned is not None and isinstance(tuned, AdapterCheckpoint):
            # Of what it holds no change of, this is the aligned tensor.
            finetuned = tuned.read(step.info.name, aligned)
        else:
            finetuned = tuned.read(step.info.name)
        differs = aligned is None or (aligned is not finetuned and not _same(aligned, finetuned))
        decided = restored and (differs or self.method.without_delta)
        curvatures = self._curvatures(step, needed=decided)
        if not decided:
            return Inputs(step, finetuned, aligned, differs, ())
        assert aligned is not None, "a tensor that is restored has an aligned counterpart"  # noqa: S101
        others: dict[Role, Sequence[Tensor]] = {
            role: self._matrices(step, other.source.read(other.names[step.aligned_name]))
            for role, other in self.job.others.items()
        }
        pairs = zip(self._matrices(step, aligned), self._matrices(step, finetuned), curvatures, strict=True)
        layers = tuple(
            Layer(
                one, other, self._pair(product), {role: each[i] for role, each in others.items()}, curvature
            )
            if self.method.without_delta or not _same(one, other)
            else None
            for i, (one, other, curvature) in enumerate(pairs)
        )
        return Inputs(step, finetuned, aligned, differs, layers)

    def _curvatures(self, step: Step, *, needed: bool) -> list[Curvature]:
        """Read what the method needs of each matrix of a step that has an aligned counterpart."""
        store = self.job.store
        if store is None or not step.groups:
            return [Curvature()] * max(1, step.experts)
        pairs = zip(step.groups, step.keys, strict=True)
        return [self._curvature(store, group, key, needed=needed) for group, key in pairs]

    def _curvature(self, store: CurvatureStore, group: str, key: str, *, needed: bool) -> Curvature:
        """Read what the method needs; what layers of a group share is held until the last of them."""
        needs = self.method.needs
        if needed and group not in self._shared:
            found = Curvature(
                inputs=store.input_spectrum(group) if "inputs" in needs else None,
                hessian=store.hessian(group) if "hessian" in needs else None,
                factor=store.factor(group) if "factor" in needs else None,
            )
            self._shared[group] = map_tensors(found, self._taken)
        self.uses[group] -= 1
        shared = self._shared.get(group, Curvature())
        if not self.uses[group]:
            self._shared.pop(group, None)
        if not needed:
            return Curvature()
        outputs = store.output_spectrum(key) if "outputs" in needs else None
        leaning = store.leaning(key) if "leaning" in needs else None
        return replace(
            shared,
            outputs=map_tensors(outputs, self._taken),
            output_mean=store.output_mean(key) if "output_mean" in needs else None,
            leaning=map_tensors(leaning, self._taken),
        )

    def _matrices(self, step: Step, tensor: Tensor) -> Sequence[Tensor]:
        return matrices_of(step, self._taken(tensor))

    def _pair(self, product: ThinDelta | None) -> tuple[Tensor, Tensor] | None:
        return None if product is None else (self._taken(product.up), self._taken(product.down))

    def _taken(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


def matrices_of(step: Step, tensor: Tensor) -> Sequence[Tensor]:
    """Take what of a tensor a method decides, matrices (out, in): the rows that all models have."""
    if step.experts:
        return (tensor.mT if step.transposed else tensor).unbind()
    if step.shared_rows:
        tensor = tensor[: step.shared_rows]
    if tensor.ndim != 2:
        return (tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1),)
    return (tensor.T if step.transposed else tensor,)


def tensor_of(step: Step, weight: Tensor, finetuned: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Put a restored weight, (out, in), or those of a stack back into the form of their tensor.

    Args:
        step: of the plan.
        weight: restored.
        finetuned: the fine-tuned tensor, whose rows beyond the shared ones stay.
        dtype: of the output.
    """
    turned = weight.mT if step.transposed else weight
    if step.shared_rows:
        assert finetuned is not None, "read with its weights"  # noqa: S101
        found = finetuned.to(dtype, copy=True)
        found[: step.shared_rows] = turned.to(dtype).reshape(found[: step.shared_rows].shape)
        return found
    return turned.to(dtype).reshape(step.info.shape).contiguous()


def _adds_nothing(delta: ThinDelta) -> bool:
    """Whether one matrix is zero, and the other finite: zero times NaN is NaN."""
    zero = not (delta.up.any() and delta.down.any())
    return zero and is_finite(delta.up) and is_finite(delta.down)


def _same(one: Tensor, other: Tensor) -> bool:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.to(dtype), other.to(dtype))


def known_store(job: Job) -> CurvatureStore:
    """Give the store of a job whose method needs one."""
    assert job.store is not None, "a method with a price has a store"  # noqa: S101
    return job.store
