"""A trial of which every process of a run prepares and solves a part of the layers.

Rank 0 restores as if it were alone, with a `SharedTrial`. Whenever that is asked for layers, it tells the
others what, and collects what they send, in the order of the plan. They do nothing but answer (`serve`).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from deltaguard.device import find_device
from deltaguard.progress import Progress, ignore
from deltaguard.ranks import Ranks
from deltaguard.reports.records.restore import LayerRow
from deltaguard.restoration.footprint import Footprint
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.trial import Edited, Trial, kept_budget
from deltaguard.solvers import LowRank, Profile

_MOVED = 256
"""Multiplications an entry that take as long as reading, sending and writing it, about."""

_Answer = tuple[Any, Sequence[Tensor]]
"""What is told of one layer, and its tensors; None, and none, of a layer that the method leaves alone."""


@dataclass(frozen=True)
class _Ask:
    """What rank 0 asks of all.

    Attributes:
        what: the method of `Trial` that is called for each rank's own layers.
        prices: its argument, one but for `at_prices`.
        with_weights: likewise.
        names: of the tensors that are wanted, in their order; all where it is empty.
    """

    what: Literal["profiles", "weights", "at_prices", "edited", "factors"]
    prices: tuple[float, ...] = ()
    with_weights: bool = True
    names: tuple[str, ...] = ()

    def steps(self, trial: Trial) -> list[Step]:
        """List the steps of a trial that are asked for."""
        own = {step.info.name: step for step in trial.steps}
        return [own[name] for name in self.names or own if name in own]


class SharedTrial(Trial):
    """A trial that rank 0 asks for layers, of which it solves its own and collects the others'.

    What it gives is what a `Trial` gives, to the last bit, if all processes compute with as many threads.
    """

    def __init__(
        self, job: Job, plan: Plan, config: RestoreConfig, folder: Path, *, ranks: Ranks, reserve: int = 0
    ) -> None:
        """Read nothing yet; the arguments are those of `Trial`, and the ranks."""
        super().__init__(job, plan, config, folder, reserve=reserve)
        self._ranks, self._owners = ranks, owners_of(plan, ranks)
        self._own = own_trial(job, plan, config, folder, ranks=ranks, reserve=reserve)

    def profiles(self, report: Progress, *, with_weights: bool = True) -> dict[str, Profile]:
        """Say of each layer how its delta is spread, as `Trial.profiles`; told of this rank's layers."""
        self._ranks.from_first(_Ask("profiles", with_weights=with_weights))
        own = self._own.profiles(report, with_weights=with_weights)
        found = {name: each for part in self._ranks.from_all(own) for name, each in part.items()}
        return {step.info.name: found[step.info.name] for step in self.steps if step.info.name in found}

    def weights(self, price: float) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor that the method changes, as `Trial.weights`; others' are on the CPU."""
        for step, message, tensors in self._collected(_Ask("weights", (price,))):
            if message is not None:
                yield step.info.name, tensors[0]

    def at_prices(self, steps: Sequence[Step], prices: Sequence[float]) -> Iterator[tuple[str, list[Tensor]]]:
        """Give tensors at each of several prices, as `Trial.at_prices`; others' are on the CPU."""
        names = tuple(step.info.name for step in steps if step.action is Action.RESTORE)
        solved = self._collected(_Ask("at_prices", tuple(prices), names=names))
        others = super().at_prices([step for step in steps if step.action is not Action.RESTORE], prices)
        for step in steps:
            if step.action is Action.RESTORE:
                yield step.info.name, list(next(solved)[2])
            else:
                yield next(others)

    def edited(self, steps: Sequence[Step], price: float) -> Iterator[Edited]:
        """Carry out steps, in their order, as `Trial.edited`; what no method decides is read here."""
        layers = [step for step in steps if step.action is Action.RESTORE]
        names = tuple(step.info.name for step in layers)
        solved = self._collected(_Ask("edited", (price,), names=names))
        others = super().edited([step for step in steps if step.action is not Action.RESTORE], price)
        for step in steps:
            if step.action is Action.RESTORE:
                _, row, tensors = next(solved)
                yield Edited(tensors[0], row)
            else:
                yield next(others)

    def factors(self, price: float) -> Iterator[tuple[Step, LowRank, LayerRow]]:
        """Give the restored delta of every layer as factors of an adapter, as `Trial.factors`."""
        for step, (residual, row), (down, up) in self._collected(_Ask("factors", (price,))):
            yield step, LowRank(down, up, residual), row

    def _collected(self, ask: _Ask) -> Iterator[tuple[Step, Any, Sequence[Tensor]]]:
        """Ask all ranks, and give the layers in the order of the plan."""
        self._ranks.from_first(ask)
        own, left = _answers(self._own, ask), deque(ask.steps(self))
        try:
            while left:
                step = left.popleft()
                owner = self._owners[step.info.name]
                message, tensors = next(own) if owner == self._ranks.rank else self._ranks.receive(owner)
                yield step, message, tensors
        except GeneratorExit:
            # Nobody wants the rest, and the others send all that was asked for.
            for step in left:
                if (owner := self._owners[step.info.name]) != self._ranks.rank:
                    self._ranks.receive(owner)
            raise


def open_trial(
    job: Job, plan: Plan, config: RestoreConfig, folder: Path, *, ranks: Ranks, reserve: int = 0
) -> Trial:
    """Make the trial that rank 0 restores with; the arguments are those of `SharedTrial`."""
    if ranks.size == 1:
        return Trial(job, plan, config, folder, reserve=reserve)
    return SharedTrial(job, plan, config, folder, ranks=ranks, reserve=reserve)


def owners_of(plan: Plan, ranks: Ranks) -> Mapping[str, int]:
    """Say which rank restores each layer of a plan, by its tensor's name: balanced by their arithmetic."""
    steps = [step for step in plan.steps if step.action is Action.RESTORE]
    owners = ranks.shares([_cost(step) for step in steps], in_turn=True)
    return {step.info.name: owner for step, owner in zip(steps, owners, strict=True)}


def own_trial(
    job: Job, plan: Plan, config: RestoreConfig, folder: Path, *, ranks: Ranks, reserve: int = 0
) -> Trial:
    """Make the trial of the layers that this rank restores; the arguments are those of `SharedTrial`."""
    owners = owners_of(plan, ranks)
    own = tuple(step for step in plan.steps if owners.get(step.info.name) == ranks.rank)
    device = find_device(config.device)
    memory = kept_budget(Footprint.of(job, plan, config), config, device)
    if config.memory is None:
        memory //= ranks.sharing(device)
    return Trial(job, replace(plan, steps=own), config, folder, reserve=reserve, memory=memory)


def serve(trial: Trial, ranks: Ranks) -> None:
    """Answer rank 0 until it has nothing more to ask.

    While one layer is sent, the next is solved.

    Args:
        trial: of this rank's layers, see `own_trial`.
        ranks: all processes.

    Raises:
        DeltaguardError: as the methods of `Trial`, or another process has ended.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="send") as sender:
        while (ask := ranks.from_first(None)) is not None:
            if ask.what == "profiles":
                ranks.from_all(trial.profiles(ignore, with_weights=ask.with_weights))
                continue
            sent: Future[None] | None = None
            for message, tensors in _answers(trial, ask):
                if sent is not None:
                    sent.result()
                sent = sender.submit(ranks.send, 0, message, tensors)
            if sent is not None:
                sent.result()


def _cost(step: Step) -> float:
    rows, columns = step.matrix_shape
    return max(1, step.experts) * rows * columns * (rows + columns + _MOVED)


def _answers(trial: Trial, ask: _Ask) -> Iterator[_Answer]:
    """Answer for one layer of this rank after the other."""
    steps = ask.steps(trial)
    if ask.what == "at_prices":
        yield from trial.at_prices(steps, ask.prices)
        return
    (price,) = ask.prices
    if ask.what == "edited":
        for edited in trial.edited(steps, price):
            yield edited.row, (edited.tensor,)
    elif ask.what == "factors":
        for _, found, row in trial.factors(price):
            yield (found.residual, row), (found.down, found.up)
    else:
        changed = trial.weights(price)
        found = next(changed, None)
        for step in steps:
            if found is None or found[0] != step.info.name:
                yield None, ()
                continue
            yield found[0], (found[1],)
            found = next(changed, None)
