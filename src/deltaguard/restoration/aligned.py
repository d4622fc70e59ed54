"""What restores from one aligned model share: it, its store and further models, opened once."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from deltaguard.curvature.store import CurvatureStore
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import expanded
from deltaguard.methods.method import Role
from deltaguard.models.checkpoint import Checkpoint, name_map
from deltaguard.models.durable import InUseError
from deltaguard.models.opened import Snapshot, refuse_changes
from deltaguard.progress import Progress
from deltaguard.ranks import Ranks
from deltaguard.restoration.acceptance import MOST_LOOKS, Rule
from deltaguard.restoration.agreement import Identified, require_agreement
from deltaguard.restoration.job import (
    Job,
    Other,
    default_store_folder,
    find_store,
    open_finetuned,
)
from deltaguard.restoration.looks import Requests, make_judge
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan, make_plan


class SharedInputError(DeltaguardError):
    """What all fine-tunes of an aligned model share cannot be used, so that none of them can be restored."""


@dataclass
class AlignedInputs:
    """What restores from one aligned model share, opened once: the model, its store and further models.

    Attributes:
        aligned: the aligned model.
        config: the options.
        store: the curvature, or where it lies; None where none was named.
        asked: the file of the user's requests, if there is one, as it was before it was read.
    """

    aligned: Checkpoint
    config: RestoreConfig
    store: CurvatureStore | str | Path | None
    asked: Snapshot
    _opened: CurvatureStore | None = None

    @classmethod
    def open(
        cls,
        aligned: str | Path,
        *,
        store: CurvatureStore | str | Path | None,
        config: RestoreConfig,
    ) -> "AlignedInputs":
        """Open the aligned model; the store is opened for the first fine-tune that it fits.

        Args:
            aligned: a local folder, a Hub id, or `id@revision`.
            store: the aligned model's curvature or where it lies.
            config: the options; a method that needs no curvature ignores the store.

        Raises:
            DeltaguardError: the model cannot be opened.
        """
        asked = Snapshot.of(lambda: [] if config.prompts is None else [expanded(config.prompts)])
        return cls(Checkpoint.open(aligned), config, store, asked)

    def look(self, finetuned: str | Path) -> Job:
        """Open a fine-tune, and refuse what cannot be restored before anything is calibrated.

        Args:
            finetuned: a local folder, a Hub id, `id@revision`, or a PEFT LoRA adapter.

        Returns:
            The job, without a store where none was named and none is in `default_store_folder`.

        Raises:
            SharedInputError: the aligned model has changed since it was opened, or the store cannot be used.
            DeltaguardError: the fine-tune, or a further model, cannot be opened; they do not fit the aligned
                model; it is open which configuration, tokenizer and chat template the output is to have; or
                there are too few requests to ask.
        """
        base, config = self.aligned, self.config
        with _shared():
            of_store = self._opened.changes() if self._opened else []
            refuse_changes(base.changes() + self.asked.changes() + of_store)
        tuned = open_finetuned(base, finetuned)
        everywhere = config.chosen_method.everywhere
        plan = make_plan(base, tuned, store=None, other_params=config.other_params, everywhere=everywhere)
        other = Identified.of(tuned)
        require_agreement(self._identified, other, plan, config)
        identity = self._identified.identity
        if config.added_attack_success is not None:
            asked = Requests.of(config.prompts)
            Rule(config.added_attack_success, MOST_LOOKS).require(len(asked.harmful), len(asked.harmless))
        if config.needs_curvature and self._opened is None:
            with _shared():
                self._opened = find_store(base, identity, self.store, rank=config.rank)
        others = self._others(plan)
        return Job(base, tuned, self._opened, identity, other.identity, others, self.asked)

    def require_one_mind(self, job: Job, ranks: Ranks) -> None:
        """Refuse to go on where some processes would calibrate and others not; all of them call this.

        Args:
            job: of `look`.
            ranks: the processes that share the work.

        Raises:
            SharedInputError: some find a store, and others none.
        """
        if len(set(ranks.from_all(job.store is None))) > 1:
            raise SharedInputError(
                f"Some of the {ranks.size} processes find a store of {self.aligned.reference} in the cache, "
                "and others none: give one that all can read, with `--store`."
            )

    def with_store(self, job: Job, progress: Progress | None = None, ranks: Ranks | None = None) -> Job:
        """Calibrate the aligned model where a job has no store and the method needs one.

        The store is made in `default_store_folder`, and found there the next time.

        Args:
            job: of `look`.
            progress: called while calibrating.
            ranks: the processes that share the work, all of which call this; by default this one alone.

        Raises:
            SharedInputError: the calibration failed.
        """
        config, ranks = self.config, ranks or Ranks()
        if job.store is not None or not config.needs_curvature:
            return job
        if ranks.leads and config.added_attack_success is not None:
            with _shared():
                # A judge that is not there is told before hours of calibrating.
                make_judge(config)
        from deltaguard.curvature.calibrate import calibrate
        from deltaguard.curvature.request import CalibrateConfig

        aligned = self.aligned.reference
        folder = default_store_folder(job.aligned_identity, config.rank)
        how = CalibrateConfig(resume=True, rank=config.rank, device=config.device, memory=config.memory)
        try:
            with _shared():
                self._opened = calibrate(aligned, folder, config=how, progress=progress, ranks=ranks)
        except InUseError as error:
            raise SharedInputError(
                f"Another process is calibrating {aligned} right now, into {folder}. Run this again when it "
                "is done, or give a store with `--store`."
            ) from error
        return replace(job, store=self._opened)

    @cached_property
    def _identified(self) -> Identified:
        return Identified.of(self.aligned)

    @cached_property
    def _further(self) -> Mapping[Role, Other]:
        """The further models."""
        found: dict[Role, Other] = {}
        for role, reference in self.config.models.items():
            source = open_finetuned(self.aligned, reference)
            found[role] = Other(source, name_map(list(self.aligned.tensors), list(source.tensors)))
        return found

    def _others(self, plan: Plan) -> Mapping[Role, Other]:
        """Give the further models, and refuse those that lack a tensor or have it in another shape."""
        problems: list[str] = []
        for role, other in self._further.items():
            for step in plan.steps:
                if step.action is not Action.RESTORE:
                    continue
                name, shape = step.aligned_name, self.aligned.tensors[step.aligned_name].shape
                own = other.names.get(name)
                if own is None:
                    problems.append(f"Tensor `{name}` is in the aligned model and not in the {role} one.")
                elif (found := other.source.tensors[own].shape) != shape:
                    problems.append(
                        f"Tensor `{name}` is {shape} in the aligned model and {found} in the {role} one."
                    )
        if problems:
            raise DeltaguardError(listed(f"{self.config.method} cannot use these models", problems))
        return self._further


def open_job(
    aligned: str | Path,
    finetuned: str | Path,
    *,
    store: CurvatureStore | str | Path | None,
    config: RestoreConfig,
    progress: Progress | None = None,
) -> Job:
    """Open the models and the store of one restore.

    Args:
        aligned: as in `AlignedInputs.open`, like `store` and `config`.
        finetuned: as in `AlignedInputs.look`.
        store: the aligned model's curvature or where it lies.
        config: the options.
        progress: called while calibrating.

    Raises:
        DeltaguardError: one of them cannot be opened, or the calibration failed.
    """
    inputs = AlignedInputs.open(aligned, store=store, config=config)
    return inputs.with_store(inputs.look(finetuned), progress)


@contextmanager
def _shared() -> Generator[None]:
    """Say of a failure that it concerns every fine-tune."""
    try:
        yield
    except InUseError:
        raise
    except DeltaguardError as error:
        raise SharedInputError(str(error)) from error
