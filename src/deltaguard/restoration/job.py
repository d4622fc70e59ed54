"""The inputs of a restore, opened: headers are read, weights are not."""

import os
from dataclasses import dataclass
from pathlib import Path

from deltaguard.checkpoints.adapter import AdapterCheckpoint, is_adapter
from deltaguard.checkpoints.checkpoint import Checkpoint, WeightSource
from deltaguard.checkpoints.durable import InUseError
from deltaguard.checkpoints.opened import refuse_changes
from deltaguard.curvature.rank import Rank
from deltaguard.curvature.store import CurvatureStore, not_whole
from deltaguard.curvature.store_format import MANIFEST
from deltaguard.errors import DeltaguardError
from deltaguard.progress import Progress
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Plan, make_plan


@dataclass(frozen=True)
class Job:
    """A pair of models and, where the method needs it, the aligned one's curvature."""

    aligned: Checkpoint
    finetuned: WeightSource
    store: CurvatureStore | None

    def plan(self, config: RestoreConfig) -> Plan:
        """What would be done, from headers alone."""
        return make_plan(
            self.aligned,
            self.finetuned,
            store=self.store,
            other_params=config.other_params,
            rank=config.rank,
        )

    def check_unchanged(self) -> None:
        """Refuse to go on where an input was replaced or written to since it was opened.

        Raises:
            DeltaguardError: files changed; all are listed.
        """
        changes = self.aligned.changes() + self.finetuned.changes()
        changes += self.store.changes() if self.store else []
        refuse_changes(dict.fromkeys(changes))


def open_models(aligned: str | Path, finetuned: str | Path) -> tuple[Checkpoint, WeightSource]:
    """Open an aligned model and a fine-tuned one, which may be an adapter.

    Args:
        aligned: a local folder, a Hub id, or `id@revision`.
        finetuned: the same, or a PEFT LoRA adapter.

    Raises:
        DeltaguardError: one of them cannot be used.
    """
    base = Checkpoint.open(aligned)
    return base, AdapterCheckpoint.open(base, finetuned) if is_adapter(finetuned) else Checkpoint.open(
        finetuned
    )


def open_job(
    aligned: str | Path,
    finetuned: str | Path,
    *,
    store: CurvatureStore | str | Path | None,
    config: RestoreConfig,
    progress: Progress | None = None,
) -> Job:
    """Open the models and the store of a restore.

    Args:
        aligned: as in `open_models`.
        finetuned: as in `open_models`.
        store: the aligned model's curvature or where it lies. Where it is absent and the method needs it,
            the aligned model is calibrated into `default_store_folder`, and found there the next time.
        config: the options; a method that needs no curvature ignores the store.
        progress: called while calibrating.

    Raises:
        DeltaguardError: one of them cannot be opened, or the calibration failed.
    """
    base, tuned = open_models(aligned, finetuned)
    if not config.needs_curvature:
        return Job(base, tuned, None)
    known = find_store(base, store, rank=config.rank)
    if known is None:
        from deltaguard.calibration.calibrate import CalibrateConfig, calibrate

        folder = default_store_folder(base, config.rank)
        how = CalibrateConfig(resume=True, rank=config.rank, device=config.device)
        try:
            known = calibrate(aligned, folder, config=how, progress=progress)
        except InUseError as error:
            raise DeltaguardError(
                f"Another process is calibrating {aligned} right now, into {folder}. Run this again when it "
                "is done, or give a store with `--store`."
            ) from error
    return Job(base, tuned, known)


def find_store(
    aligned: Checkpoint, store: CurvatureStore | str | Path | None, *, rank: Rank
) -> CurvatureStore | None:
    """The store that was named, else the one in `default_store_folder`, else None.

    Raises:
        DeltaguardError: a store was named and cannot be opened, or does not keep what is needed.
    """
    if isinstance(store, CurvatureStore):
        known = store
    elif store is not None:
        known = CurvatureStore.from_pretrained(store)
    else:
        folder = default_store_folder(aligned, rank)
        return _kept_store(folder, aligned) if (folder / MANIFEST).is_file() else None
    if rank == "full" and not known.is_whole:
        raise DeltaguardError(not_whole(known.folder, known.provenance.aligned))
    return known


def _kept_store(folder: Path, aligned: Checkpoint) -> CurvatureStore:
    try:
        return CurvatureStore.from_pretrained(folder)
    except DeltaguardError as error:
        raise DeltaguardError(
            f"{error}\nThis is what was kept of an earlier calibration of {aligned.reference}. "
            f"Delete {folder} and run the same command again: it is made anew."
        ) from error


def default_store_folder(aligned: Checkpoint, rank: Rank) -> Path:
    """Where the store of an aligned model is kept if none is named: one folder per fingerprint and rank.

    Under `DELTAGUARD_CACHE`, else `XDG_CACHE_HOME/deltaguard`, else `~/.cache/deltaguard`.
    """
    cache = os.environ.get("DELTAGUARD_CACHE")
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaguard"
    return Path(cache) / f"{aligned.fingerprint()[:32]}-{rank}"
