"""A restore at any price: layers are read and prepared once, then serve the dial, a sweep and the output."""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from deltaguard.device import find_device, memory_bytes
from deltaguard.errors import DeltaguardError
from deltaguard.methods.method import PreparedLayer, PricedLayer
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.adapter_writer import adapter_dtype
from deltaguard.models.families import is_mask
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress
from deltaguard.reports.records.restore import LayerRow, OtherRow
from deltaguard.restoration.footprint import Footprint
from deltaguard.restoration.job import Job
from deltaguard.restoration.kept import Kept
from deltaguard.restoration.layers import Inputs, matrices_of, read_layers, tensor_of
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.stacked import Stacked
from deltaguard.solvers import LowRank, Outcome, Profile, Solution, joint_profile, low_rank
from deltaguard.solvers.low_rank import ROUNDING
from deltaguard.solvers.solution import is_finite, share

_UNCHANGED = Outcome(kept_energy=1.0, safety_cost=0.0, utility_loss=0.0, detail={"delta_norm": 0.0})
PARTS_OF_MEMORY = 4
"""By default prepared layers take one part in so many of the memory of the device that they are on."""
_SPARE_DISK = 64 << 20
"""Room for what is not counted: reports, progress, and what a file system takes for itself."""


@dataclass(frozen=True)
class Edited:
    """A tensor as it will be written, and its row of the report."""

    tensor: Tensor
    row: LayerRow | OtherRow


@dataclass(frozen=True)
class _Taken(Edited):
    row: OtherRow


@dataclass(frozen=True)
class _Ready:
    """A layer that a price can be put on; `prepared` is None where it has no delta."""

    step: Step
    with_weights: bool
    finetuned: Tensor | None
    prepared: PreparedLayer | None


def kept_budget(found: Footprint, config: RestoreConfig, device: torch.device) -> int:
    """Say how many bytes of prepared layers may wait for the next price in the memory of a device.

    Args:
        found: of the dial, which comes first where it is measured block by block.
        config: the options.
        device: that the layers are on.
    """
    memory = memory_bytes(device) // PARTS_OF_MEMORY if config.memory is None else int(config.memory)
    return min(memory, found.left) if config.dial is not None and found.by_blocks else memory


class Trial:
    """The layers of a restore, ready for one price after another."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        config: RestoreConfig,
        folder: Path,
        *,
        reserve: int = 0,
        memory: int | None = None,
    ) -> None:
        """Read nothing yet. Layers are prepared and solved on the device that the options name.

        Args:
            job: the models and the store.
            plan: what becomes of every tensor.
            config: the options.
            folder: where a scratch file may lie.
            reserve: bytes of the disk that the output takes, for which the scratch file leaves room.
            memory: bytes that prepared layers may take; by default `kept_budget`.
        """
        self.job, self.plan, self.config = job, plan, config
        self.steps = tuple(step for step in plan.steps if step.action is Action.RESTORE)
        self.device = find_device(config.device)
        self.footprint = Footprint.of(job, plan, config)
        if memory is None:
            memory = kept_budget(self.footprint, config, self.device)
        # A method without a price serves one strength: nothing is to be kept for another.
        self._folder, self._reserve = folder, reserve + _SPARE_DISK
        self._kept = self.scratch(memory) if config.is_priced else None
        self._of_factors = adapter_dtype(job.aligned)
        # What an adapter leaves alone is known without reading it.
        tuned, self._unchanged = job.finetuned, set[str]()
        if isinstance(tuned, AdapterCheckpoint) and not config.chosen_method.without_delta:
            self._unchanged.update(
                step.info.name for step in self.steps if step.info.name not in tuned.adapted
            )
        self._joint: Profile | None = None

    @property
    def own(self) -> "Trial":
        """The trial of the layers that this process prepares; itself, where it works alone."""
        return self

    def scratch(self, memory: int) -> Kept:
        """Keep tensors of the device in some bytes of its memory, else in a file beside the output.

        Args:
            memory: bytes.
        """
        return Kept(memory, self._folder, self._reserve, self.device)

    def profile(self, report: Progress, *, with_weights: bool = True) -> Profile:
        """Say how the deltas of all layers together are spread over prices; they are read once for it.

        Args:
            report: told of each layer.
            with_weights: False where no weight will be asked for, see `read_layers`; of no use after the
                first call.

        Raises:
            DeltaguardError: a weight is not finite, or the curvature is damaged.
        """
        if self._joint is None:
            self._joint = joint_profile(self.profiles(report, with_weights=with_weights).values())
        return self._joint

    def profiles(self, report: Progress, *, with_weights: bool = True) -> dict[str, Profile]:
        """Say so of each layer that has a delta, by its tensor's name, as `profile` does of all."""
        parts: dict[str, Profile] = {}
        steps = [step for step in self.steps if step.info.name not in self._unchanged]
        for number, ready in enumerate(self._ready(steps, with_weights=with_weights), start=1):
            if ready.prepared is not None:
                assert isinstance(ready.prepared, PricedLayer), "only methods with a price search"  # noqa: S101
                parts[ready.step.info.name] = ready.prepared.profile()
            report(Event("project", number, len(steps)))
        return parts

    def weights(self, price: float) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor that the method changes, as it would be written at a price, on the device."""
        steps = [step for step in self.steps if step.info.name not in self._unchanged]
        for ready in self._ready(steps):
            if ready.prepared is not None:
                yield ready.step.info.name, self._solved(ready, ready.prepared, price)[0]

    def at_prices(self, steps: Sequence[Step], prices: Sequence[float]) -> Iterator[tuple[str, list[Tensor]]]:
        """Give tensors as they would be written at each of several prices, on the device.

        Each is read and prepared once for all prices, and kept for the next ones where there is room.

        Args:
            steps: in the order wanted.
            prices: of the tensors that a method decides; of all others the same tensor is given for each.
        """
        known = self._known(steps, with_weights=True)
        inputs = self._read([step for step in steps if step.info.name not in known])
        for step in steps:
            if step.action is not Action.RESTORE:
                yield step.info.name, [self._taken(next(inputs)).tensor] * len(prices)
                continue
            ready = self._next(step, known, inputs, keep=True)
            if ready.prepared is None:
                yield step.info.name, [self._restored(ready, 0.0).tensor] * len(prices)
            else:
                prepared = ready.prepared
                yield step.info.name, [self._solved(ready, prepared, price)[0] for price in prices]

    def finetuned_tensor(self, name: str) -> Tensor:
        """Read a tensor of the fine-tuned model as it is stored, or as an adapter's layers compute it."""
        tuned = self.job.finetuned
        found = tuned.read(name)
        is_served_so = self.config.output_format == "adapter" and isinstance(tuned, AdapterCheckpoint)
        return found if is_served_so else found.to(DTYPES[tuned.tensors[name].dtype])

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor that no method decides, as it would be written."""
        others = [step for step in self.plan.steps if step.action is not Action.RESTORE]
        for inputs in self._read(others):
            yield inputs.step.info.name, self._taken(inputs).tensor

    def other_rows(self) -> Iterator[OtherRow]:
        """Say that every tensor which no method decides stays aligned; what an adapter leaves is not read."""
        tuned = self.job.finetuned
        touched = tuned.adapted if isinstance(tuned, AdapterCheckpoint) else tuned.tensors.keys()
        others = [step for step in self.plan.steps if step.action is not Action.RESTORE]
        for step in others:
            if step.info.name not in touched:
                yield OtherRow(name=step.info.name, source="aligned", reason=step.reason, differs=False)
        changed = [step for step in others if step.info.name in touched]
        for inputs in self._read(changed):
            yield self._taken(inputs).row

    def edited(self, steps: Sequence[Step], price: float) -> Iterator[Edited]:
        """Carry out steps, in their order.

        Raises:
            DeltaguardError: weights are not finite, or the method failed; the message names the tensor.
        """
        known = self._known(steps, with_weights=True)
        # One reader for all: with one for layers and one for others, twice as much would be read ahead.
        inputs = self._read([step for step in steps if step.info.name not in known])
        for step in steps:
            if step.action is Action.RESTORE:
                edited = self._restored(self._next(step, known, inputs, keep=False), price)
            else:
                edited = self._taken(next(inputs))
            is_read = edited.tensor.is_floating_point() and not is_mask(step.info.name)
            if is_read and not is_finite(edited.tensor):
                raise DeltaguardError(
                    f"Tensor `{step.info.name}` would hold NaN or infinite values in {edited.tensor.dtype}. "
                    "If the fine-tuned model holds none, save that in bfloat16 or float32 and restore again."
                )
            yield edited

    def factors(self, price: float) -> Iterator[tuple[Step, LowRank, LayerRow]]:
        """Give the restored delta of every layer as factors of an adapter, in the precision stored.

        Raises:
            DeltaguardError: as `edited`.
        """
        for ready in self._ready(self.steps, with_weights=False, last=True):
            step, started = ready.step, time.perf_counter()
            rows, columns = step.matrix_shape
            factors, outcome = LowRank(torch.zeros(0, columns), torch.zeros(rows, 0), 0.0), _UNCHANGED
            if ready.prepared is not None:
                found, outcome = self._factors(step, ready.prepared, price)
                factors = LowRank(found.down.cpu(), found.up.cpu(), found.residual)
            yield step, factors, _row(step, outcome, started)

    def _ready(
        self, steps: Sequence[Step], *, with_weights: bool = True, last: bool = False
    ) -> Iterator[_Ready]:
        """Give layers with all that does not depend on the price, kept from an earlier pass or made now.

        One at a time: all that the scratch file holds need not fit into memory. What is made for the last
        price is not kept for another.
        """
        known = self._known(steps, with_weights=with_weights)
        missing = [step for step in steps if step.info.name not in known]
        inputs = self._read(missing, with_weights=with_weights)
        for step in steps:
            yield self._next(step, known, inputs, keep=not last)

    def _read(self, steps: Sequence[Step], *, with_weights: bool = True) -> Iterator[Inputs]:
        method = self.config.chosen_method
        return read_layers(self.job, method, steps, device=self.device, with_weights=with_weights)

    def _known(self, steps: Sequence[Step], *, with_weights: bool) -> set[str]:
        """Name the layers that an earlier pass kept, without reading them."""
        if self._kept is None:
            return set()
        found: dict[str, _Ready | None] = {s.info.name: self._kept.peek(s.info.name) for s in steps}
        return {name for name, ready in found.items() if ready and (ready.with_weights or not with_weights)}

    def _next(self, step: Step, known: Collection[str], inputs: Iterator[Inputs], *, keep: bool) -> _Ready:
        """Give a layer that is known, or else the next one that is read."""
        if self._kept is not None and step.info.name in known:
            found: _Ready | None = self._kept.get(step.info.name)
            assert found is not None, "nothing that was kept is given up"  # noqa: S101
            return found
        return self._prepared(next(inputs), keep=keep)

    def _prepared(self, inputs: Inputs, *, keep: bool) -> _Ready:
        step, name = inputs.step, inputs.step.info.name
        if not any(inputs.layers):
            self._unchanged.add(name)
            return _Ready(step, inputs.finetuned is not None, inputs.finetuned, None)
        method, options = self.config.chosen_method, self.config.own_options
        try:
            made = [None if layer is None else method.prepare(layer, options) for layer in inputs.layers]
        except ValueError as error:
            raise _named(error, step) from error
        prepared = made[0]
        if step.experts:
            own = zip(made, matrices_of(step, inputs.weight), strict=True)
            prepared = Stacked(tuple(matrix if each is None else each for each, matrix in own))
        assert prepared is not None, "one of them has a delta"  # noqa: S101
        if keep and self._kept is not None:
            self._kept.add(name, _Ready(step, inputs.finetuned is not None, None, prepared))
        return _Ready(step, inputs.finetuned is not None, inputs.finetuned, prepared)

    def _restored(self, ready: _Ready, price: float) -> Edited:
        step, started = ready.step, time.perf_counter()
        if ready.prepared is not None:
            tensor, outcome = self._solved(ready, ready.prepared, price)
            return Edited(tensor.cpu(), _row(step, outcome, started))
        assert ready.finetuned is not None, "layers without a delta are not kept"  # noqa: S101
        return Edited(ready.finetuned.to(self._stored(step)), _row(step, _UNCHANGED, started))

    def _solved(self, ready: _Ready, prepared: PreparedLayer, price: float) -> tuple[Tensor, Outcome]:
        """Put a price on a layer: the tensor as it is written, and what it keeps."""
        step, dtype = ready.step, self._stored(ready.step)
        if self.config.output_format == "adapter":
            # Beside the aligned weight nothing rounds what an adapter adds.
            dtype = torch.promote_types(dtype, torch.float32)
            factors, outcome = self._factors(step, prepared, price)
            weight = torch.addmm(self._aligned(step).float(), factors.up.float(), factors.down.float())
        else:
            try:
                outcome = prepared.rounded_at(price, dtype)
            except ValueError as error:
                raise _named(error, step) from error
            weight = outcome.weight
        return tensor_of(step, weight, ready.finetuned, dtype), outcome

    def _factors(self, step: Step, prepared: PreparedLayer, price: float) -> tuple[LowRank, Outcome]:
        rank, dtype = self.config.adapter_rank, self._of_factors
        try:
            known = prepared.factors_at(price, rank)
            if known is None:
                known = self._cut(step, prepared.at(price), rank)
        except ValueError as error:
            raise _named(error, step) from error
        found, outcome = known
        factors = LowRank(found.down.to(dtype), found.up.to(dtype), found.residual)
        numbers = {"adapter_rank": len(factors.down), "adapter_residual": factors.residual}
        return factors, replace(outcome, detail={**outcome.detail, **numbers})

    def _cut(self, step: Step, solution: Solution, rank: int | None) -> tuple[LowRank, Outcome]:
        """Write a restored weight as a product, and say what of the fine-tuned delta that is."""
        aligned = self._aligned(step).float()
        found = low_rank(solution.weight.float() - aligned, rank=rank)
        if found.residual <= ROUNDING:
            return found, solution
        (tuned,) = matrices_of(step, self.job.finetuned.read(step.info.name).to(self.device))
        delta = tuned.float() - aligned
        product, energy = found.up @ found.down, float(delta.square().sum())
        outcome = Outcome(
            kept_energy=share(float((product * delta).sum()), energy),
            # What else the method tells is of the weight before the cut.
            safety_cost=math.nan,
            utility_loss=share(float((product - delta).square().sum()), energy),
            detail={"delta_norm": math.sqrt(energy)},
        )
        return found, outcome

    def _taken(self, inputs: Inputs) -> "_Taken":
        """Take a tensor that no method decides from the model that the plan says."""
        return _taken(inputs, self._stored(inputs.step))

    def _stored(self, step: Step) -> torch.dtype:
        """Say in which precision a tensor of the restored model lies: below an adapter, the aligned one's."""
        if self.config.output_format == "adapter" and step.aligned is not None:
            return DTYPES[self.job.aligned.tensors[step.aligned].dtype]
        return DTYPES[step.info.dtype]

    def _aligned(self, step: Step) -> Tensor:
        """Read the aligned weight, (out, in), onto the device."""
        found = self.job.aligned.read(step.aligned_name).to(self.device)
        return found.T if step.transposed else found


def _named(error: ValueError, step: Step) -> DeltaguardError:
    """Say which tensor a method failed on."""
    return DeltaguardError(f"Tensor `{step.info.name}`: {error}")


def _taken(inputs: Inputs, dtype: torch.dtype) -> "_Taken":
    """Take a tensor from the model that the plan says, in a precision."""
    step, finetuned = inputs.step, inputs.weight
    source: Literal["aligned", "finetuned", "both"] = "finetuned"
    tensor, differs = finetuned.to(dtype), inputs.differs
    if inputs.aligned is not None and step.action is Action.EXTEND:
        source = "both"
        tensor = finetuned.to(dtype, copy=True)
        tensor[: step.shared_rows] = inputs.aligned[: step.shared_rows].to(dtype)
    elif inputs.aligned is not None and step.action is Action.ALIGNED:
        source, tensor = "aligned", inputs.aligned.to(dtype)
    return _Taken(tensor, OtherRow(name=step.info.name, source=source, reason=step.reason, differs=differs))


def _row(step: Step, outcome: Outcome, started: float) -> LayerRow:
    own = dict(outcome.detail)
    return LayerRow(
        name=step.info.name,
        shape=step.info.shape,
        delta_norm=own.pop("delta_norm"),
        kept_energy=outcome.kept_energy,
        kept_entries=outcome.kept_entries,
        safety_cost=None if math.isnan(outcome.safety_cost) else outcome.safety_cost,
        utility_loss=outcome.utility_loss,
        seconds=time.perf_counter() - started,
        detail=own,
    )
