"""A trial of which every process of a run prepares and solves a part of the layers.

Rank 0 restores as if it were alone, with a `SharedTrial`. Whenever that is asked for layers, it tells the
others what, and collects what they send. They do nothing but answer (`serve`), and write their part of the
files in the end (`writing`).
"""

from collections.abc import Iterator, Sequence
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
from deltaguard.restoration.output import Output, write_beside
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.trial import Trial, kept_budget
from deltaguard.restoration.writing import Writing, cost, help_writing, solving_owners
from deltaguard.solvers import LowRank, Profile

_Answer = tuple[Any, Sequence[Tensor]]
"""What is told of one layer, and its tensors; None, and none, of a layer that the method leaves alone."""


@dataclass(frozen=True)
class _Ask:
    """What rank 0 asks of all.

    Attributes:
        what: the method of `Trial` that is called for each rank's own layers.
        prices: its argument, one but for `at_prices`.
        with_weights: likewise.
        names: of the tensors that are wanted, in their order; all where None.
    """

    what: Literal["profiles", "weights", "at_prices", "factors"]
    prices: tuple[float, ...] = ()
    with_weights: bool = True
    names: tuple[str, ...] | None = None

    def steps(self, trial: Trial) -> list[Step]:
        """List the steps of a trial that are asked for."""
        own = {step.info.name: step for step in trial.steps}
        return [own[name] for name in (own if self.names is None else self.names) if name in own]


class SharedTrial(Trial):
    """A trial that rank 0 asks for layers, of which it solves its own and collects the others'.

    What it gives is what a `Trial` gives, to the last bit, if all processes compute with as many threads.
    """

    def __init__(
        self, job: Job, plan: Plan, config: RestoreConfig, folder: Path, *, ranks: Ranks, reserve: int = 0
    ) -> None:
        """Read nothing yet; the arguments are those of `Trial`, and the ranks."""
        super().__init__(job, plan, config, folder, reserve=reserve)
        self._ranks, self._owners = ranks, solving_owners(job, plan, config, ranks)
        self._own = own_trial(job, plan, config, folder, ranks=ranks, reserve=reserve)

    @property
    def own(self) -> Trial:
        """The trial of rank 0's layers."""
        return self._own

    def profiles(self, report: Progress, *, with_weights: bool = True) -> dict[str, Profile]:
        """Say of each layer how its delta is spread, as `Trial.profiles`; told of this rank's layers."""
        self._ranks.from_first(_Ask("profiles", with_weights=with_weights))
        own = self._own.profiles(report, with_weights=with_weights)
        found = {name: each for part in self._ranks.from_all(own) for name, each in part.items()}
        return {step.info.name: found[step.info.name] for step in self.steps if step.info.name in found}

    def weights(self, price: float) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor that the method changes, as `Trial.weights`, in any order; others' on the CPU."""
        for step, message, tensors in self._collected(_Ask("weights", (price,)), self._side_by_side()):
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

    def factors(self, price: float) -> Iterator[tuple[Step, LowRank, LayerRow]]:
        """Give the restored delta of every layer as factors of an adapter, as `Trial.factors`."""
        for step, (residual, row), (down, up) in self._collected(_Ask("factors", (price,))):
            yield step, LowRank(down, up, residual), row

    def _collected(
        self, ask: _Ask, steps: Sequence[Step] | None = None
    ) -> Iterator[tuple[Step, Any, Sequence[Tensor]]]:
        """Ask all ranks, and give the layers in the order of the plan, or another one.

        Whoever wants no more before the last has failed: the others, which send all, end with this rank.
        """
        self._ranks.from_first(ask)
        own = _answers(self._own, ask)
        for step in ask.steps(self) if steps is None else steps:
            owner = self._owners[step.info.name]
            message, tensors = next(own) if owner == self._ranks.rank else self._ranks.receive(owner)
            yield step, message, tensors

    def _side_by_side(self) -> list[Step]:
        """Order the layers so that all ranks are at work at once, whoever has which of them."""
        loads = dict.fromkeys(range(self._ranks.size), 0.0)
        ready: list[tuple[float, Step]] = []
        for step in self.steps:
            owner = self._owners[step.info.name]
            loads[owner] += cost(step)
            ready.append((loads[owner], step))
        return [step for _, step in sorted(ready, key=lambda each: each[0])]


def open_trial(
    job: Job, plan: Plan, config: RestoreConfig, folder: Path, *, ranks: Ranks, reserve: int = 0
) -> Trial:
    """Make the trial that rank 0 restores with; the arguments are those of `SharedTrial`."""
    if ranks.size == 1:
        return Trial(job, plan, config, folder, reserve=reserve)
    return SharedTrial(job, plan, config, folder, ranks=ranks, reserve=reserve)


def own_trial(
    job: Job, plan: Plan, config: RestoreConfig, folder: Path, *, ranks: Ranks, reserve: int = 0
) -> Trial:
    """Make the trial of the layers that this rank restores; the arguments are those of `SharedTrial`."""
    # It depends on memory, of which machines have more or less: rank 0 says.
    owners = ranks.from_first(solving_owners(job, plan, config, ranks))
    own = tuple(step for step in plan.steps if owners.get(step.info.name) == ranks.rank)
    device = find_device(config.device)
    memory = kept_budget(Footprint.of(job, plan, config), config, device)
    if config.memory is None:
        memory //= ranks.sharing(device)
    return Trial(job, replace(plan, steps=own), config, folder, reserve=reserve, memory=memory)


def serve(trial: Trial, ranks: Ranks, plan: Plan, output: Output) -> None:
    """Answer rank 0 until it has nothing more to ask.

    Args:
        trial: of this rank's layers, see `own_trial`.
        ranks: all processes.
        plan: of the restore.
        output: of which this rank writes some files.

    Raises:
        DeltaguardError: as the methods of `Trial`, a file cannot be written, or another process has ended.
    """
    while (ask := ranks.from_first(None)) is not None:
        if isinstance(ask, Writing):
            # Rank 0 has made the folder before it asks for this.
            with write_beside(output, ranks) as files:
                help_writing(ask, plan, trial, files, ranks)
        elif ask.what == "profiles":
            ranks.from_all(trial.profiles(ignore, with_weights=ask.with_weights))
        else:
            ranks.send_ahead(0, _answers(trial, ask))


def _answers(trial: Trial, ask: _Ask) -> Iterator[_Answer]:
    """Answer for one layer of this rank after the other."""
    steps = ask.steps(trial)
    if ask.what == "at_prices":
        yield from trial.at_prices(steps, ask.prices)
        return
    (price,) = ask.prices
    if ask.what == "factors":
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
