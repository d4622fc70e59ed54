"""The weight files of an output, of which each is written by one process of a run.

Rank 0 says which files are missing and at what price; all ranks then know who writes what. Whole files go to
the ranks, of which each solves and writes its own. Where there are fewer files than ranks, the others join
those who write: they solve a part of a file's layers, and send them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from pydantic import TypeAdapter

from deltaguard.models.journal import FileRecord
from deltaguard.models.staging import StagedFiles
from deltaguard.models.writer import CheckpointWriter
from deltaguard.progress import Event, Progress, ignore
from deltaguard.ranks import Ranks
from deltaguard.reports.records.restore import LayerRow, OtherRow
from deltaguard.restoration.footprint import Footprint
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.trial import Edited, Trial

Rows = Sequence[LayerRow | OtherRow]
"""What the report says of the tensors of a file."""

_ROWS: TypeAdapter[tuple[LayerRow | OtherRow, ...]] = TypeAdapter(tuple[LayerRow | OtherRow, ...])

_MOVED = 256
"""Multiplications an entry that take as long as reading, sending and writing it, about."""


@dataclass(frozen=True)
class Writing:
    """What is to be written.

    Attributes:
        files: the weight files, in their order.
        price: of the layers.
        whole: whether what no method decides is fine-tuned, as the layers are.
        by_first: whether rank 0 writes all of them, since it alone has what belongs into them.
    """

    files: tuple[str, ...]
    price: float
    whole: bool = False
    by_first: bool = False

    def plan(self, plan: Plan, trial: Trial) -> Plan:
        """Say what becomes of every tensor, given the plan of the restore and any of its trials."""
        if not self.whole:
            return plan
        kept = trial.job.plan(trial.config.model_copy(update={"other_params": "finetuned"}))
        reason = "the whole model is within the safety KL allowed"
        steps = (replace(s, reason=reason) if s.action is Action.FINETUNED else s for s in kept.steps)
        return replace(kept, steps=tuple(steps))


@dataclass(frozen=True)
class Teams:
    """Which rank writes each file, and which solves each layer of it.

    Attributes:
        writers: the rank that writes, by file.
        owners: the rank that solves a layer, by its tensor's name.
    """

    writers: Mapping[str, int]
    owners: Mapping[str, int]

    @classmethod
    def of(cls, plan: Plan, files: Sequence[str], ranks: Ranks, *, by_first: bool = False) -> "Teams":
        """Split files over ranks, so that all have about as much arithmetic.

        Args:
            plan: what becomes of every tensor.
            files: to be written.
            ranks: all of them.
            by_first: whether rank 0 writes all files, and the others solve for it.
        """
        if by_first:
            return cls(dict.fromkeys(files, 0), owners_in_turn(plan.steps, ranks))
        steps = {file: plan.in_shard(file) for file in files}
        costs = [sum(map(cost, steps[file])) for file in files]
        teams = {file: [rank] for file, rank in zip(files, ranks.shares(costs), strict=True)}
        # None are left where there are as many files as ranks, or more.
        left = sorted(set(range(ranks.size)) - {team[0] for team in teams.values()}) if files else []
        for rank in left:
            loads = [each / len(teams[file]) for file, each in zip(files, costs, strict=True)]
            teams[files[loads.index(max(loads))]].append(rank)
        owners: dict[str, int] = {}
        for file, team in teams.items():
            shared = owners_in_turn(steps[file], Ranks(size=len(team)))
            owners |= {name: team[member] for name, member in shared.items()}
        return cls({file: team[0] for file, team in teams.items()}, owners)


def owners_in_turn(steps: Sequence[Step], ranks: Ranks) -> dict[str, int]:
    """Hand out layers in their order, so that they can be collected in it with little waiting.

    Args:
        steps: those that no method decides are left out.
        ranks: all of them.

    Returns:
        The rank of each, by its tensor's name.
    """
    layers = [step for step in steps if step.action is Action.RESTORE]
    owners = ranks.shares([cost(step) for step in layers], in_turn=True)
    return {step.info.name: owner for step, owner in zip(layers, owners, strict=True)}


def cost(step: Step) -> float:
    """Estimate the work that a tensor is: multiplications, about, and moving its entries."""
    if step.action is not Action.RESTORE:
        return prod(step.info.shape) * _MOVED
    rows, columns = step.matrix_shape
    return max(1, step.experts) * rows * columns * (rows + columns + _MOVED)


def solving_owners(job: Job, plan: Plan, config: RestoreConfig, ranks: Ranks) -> Mapping[str, int]:
    """Say which rank prepares and solves each layer until the price is found, by its tensor's name.

    That is the one that will write it, so that what it has prepared serves there. Layers are handed out in
    turn instead where rank 0 needs them in their order: for an adapter, for a dial that goes block by block,
    and where it refines them.

    Args:
        job: the models and the store.
        plan: what becomes of every tensor.
        config: the options.
        ranks: all of them.
    """
    by_blocks = config.dial is not None and Footprint.of(job, plan, config).by_blocks
    if config.output_format == "adapter" or by_blocks or config.refine:
        return owners_in_turn(plan.steps, ranks)
    return Teams.of(plan, job.finetuned.shards, ranks).owners


def write_files(
    trial: Trial,
    price: float,
    writer: CheckpointWriter,
    ranks: Ranks,
    report: Progress,
    *,
    whole: bool = False,
    change: Callable[[Edited], Edited] | None = None,
) -> list[LayerRow | OtherRow]:
    """Write all weight files that are not finished yet, as rank 0.

    Args:
        trial: the layers.
        price: of them.
        writer: of the output.
        ranks: all processes; the others `help_writing`.
        report: told of each tensor.
        whole: whether what no method decides is fine-tuned, as the layers are.
        change: what becomes of each tensor before it is written; rank 0 writes all files then.

    Returns:
        What is told of each tensor, in the order of the plan.

    Raises:
        DeltaguardError: weights are not finite, a method failed, or a file cannot be written.
    """
    shards = trial.job.finetuned.shards
    missing = tuple(shard for shard in shards if writer.finished(shard) is None)
    asked = Writing(missing, price, whole, by_first=change is not None)
    plan = asked.plan(trial.plan, trial)
    found: dict[str, Rows] = {
        shard: _noted_rows(writer, record, plan.in_shard(shard))
        for shard in shards
        if (record := writer.finished(shard)) is not None
    }
    done = _Done(ranks, report, sum(map(len, found.values())), len(plan.steps))
    ranks.from_first(asked)
    part = _Part(trial.own, plan, asked, writer, ranks, done)
    found |= part.written(change)
    # What this rank wrote, its writer knows.
    own: tuple[tuple[FileRecord, ...], dict[str, Rows]] = (), {}
    for records, rows in ranks.from_all(own):
        for record in records:
            writer.adopt(record)
        found |= rows
    return [row for shard in shards for row in found[shard]]


def help_writing(asked: Writing, plan: Plan, trial: Trial, files: StagedFiles, ranks: Ranks) -> None:
    """Write, or solve, this rank's part of what rank 0 asks for.

    Args:
        asked: what is to be written.
        plan: of the restore.
        trial: solves layers.
        files: where this rank's files go.
        ranks: all processes.

    Raises:
        DeltaguardError: as `write_files`, or another process has ended.
    """
    plan = asked.plan(plan, trial)
    part = _Part(trial, plan, asked, files, ranks, _Done(ranks, ignore, 0, len(plan.steps)))
    rows = part.written()
    ranks.from_all((tuple(files.records.values()), rows))


class _Done:
    """Counts what all ranks have written, and tells of it."""

    def __init__(self, ranks: Ranks, report: Progress, before: int, total: int) -> None:
        self._ranks, self._report, self._total = ranks, report, total
        self._own, self._before = before, before - ranks.count(0)

    def one(self) -> None:
        """Count a tensor.

        Raises:
            LostRankError: another process has failed.
        """
        self._own += 1
        counted = self._ranks.count(1)
        done = self._own if self._ranks.size == 1 else self._before + counted
        self._report(Event("restore", done, self._total))


@dataclass(frozen=True)
class _Part:
    """What one rank does of the writing."""

    trial: Trial
    plan: Plan
    asked: Writing
    files: StagedFiles
    ranks: Ranks
    done: _Done

    def written(self, change: Callable[[Edited], Edited] | None = None) -> dict[str, Rows]:
        """Write this rank's files, and send others' what it solves of theirs; gives the rows of its own."""
        asked, rank = self.asked, self.ranks.rank
        teams = Teams.of(self.plan, asked.files, self.ranks, by_first=asked.by_first)
        found: dict[str, Rows] = {}
        for file, writer in teams.writers.items():
            steps = self.plan.in_shard(file)
            owners = [teams.owners.get(step.info.name, writer) for step in steps]
            solved = self.trial.edited(
                [s for s, o in zip(steps, owners, strict=True) if o == rank], asked.price
            )
            if writer == rank:
                found[file] = self._write(file, self._merged(owners, solved), change)
            elif rank in owners:
                self.ranks.send_ahead(writer, ((each.row, (each.tensor,)) for each in solved))
        return found

    def _merged(self, owners: Sequence[int], solved: Iterator[Edited]) -> Iterator[Edited]:
        """Give the tensors of a file in their order, this rank's and what others send."""
        for owner in owners:
            if owner == self.ranks.rank:
                yield next(solved)
            else:
                row, (tensor,) = self.ranks.receive(owner)
                yield Edited(tensor, row)

    def _write(self, file: str, tensors: Iterator[Edited], change: Callable[[Edited], Edited] | None) -> Rows:
        rows: list[LayerRow | OtherRow] = []
        with self.files.shard(file, self.trial.job.finetuned.header(file)) as sink:
            for edited in tensors if change is None else map(change, tensors):
                sink.write(edited.row.name, edited.tensor)
                rows.append(edited.row)
                self.done.one()
            sink.notes = _ROWS.dump_python(tuple(rows), mode="json")
        return rows


def _noted_rows(
    writer: CheckpointWriter, record: FileRecord, steps: Sequence[Step]
) -> tuple[LayerRow | OtherRow, ...]:
    """Find the rows of a shard that an interrupted run finished."""
    rows = writer.notes(record, _ROWS)
    wanted = [(s.info.name, s.info.shape if s.action is Action.RESTORE else None) for s in steps]
    found = [(row.name, row.shape if isinstance(row, LayerRow) else None) for row in rows]
    if found != wanted:
        raise writer.damaged(
            f"what was noted about {record.name}",
            [f"it is about {len(found)} tensors, which are not the {len(wanted)} of that shard"],
        )
    return rows
