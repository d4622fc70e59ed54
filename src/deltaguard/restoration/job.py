"""The inputs of a restore, opened: headers are read, weights are not."""

import os
from dataclasses import dataclass
from pathlib import Path

from deltaguard.checkpoints.adapter import AdapterCheckpoint, is_adapter
from deltaguard.checkpoints.checkpoint import Checkpoint, WeightSource
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import MANIFEST
from deltaguard.progress import Progress
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Plan, make_plan


@dataclass(frozen=True)
class Job:
    """A pair of models and, where the method needs it, the aligned one's curvature."""

    aligned: WeightSource
    finetuned: WeightSource
    store: CurvatureStore | None

    def plan(self, config: RestoreConfig) -> Plan:
        """What would be done, from headers alone."""
        return make_plan(self.aligned, self.finetuned, store=self.store, other_params=config.other_params)


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
    known = find_store(base, store)
    if known is None:
        from deltaguard.calibration.calibrate import CalibrateConfig, calibrate

        folder = default_store_folder(base)
        known = calibrate(aligned, folder, config=CalibrateConfig(resume=True), progress=progress)
    return Job(base, tuned, known)


def find_store(aligned: Checkpoint, store: CurvatureStore | str | Path | None) -> CurvatureStore | None:
    """The store that was named, else the one in `default_store_folder`, else None.

    Raises:
        DeltaguardError: a store was named and cannot be opened.
    """
    if isinstance(store, CurvatureStore):
        return store
    if store is not None:
        return CurvatureStore.from_pretrained(store)
    folder = default_store_folder(aligned)
    return CurvatureStore.from_pretrained(folder) if (folder / MANIFEST).is_file() else None


def default_store_folder(aligned: Checkpoint) -> Path:
    """Where the store of an aligned model is kept if none is named: one folder per fingerprint.

    Under `DELTAGUARD_CACHE`, else `XDG_CACHE_HOME/deltaguard`, else `~/.cache/deltaguard`.
    """
    cache = os.environ.get("DELTAGUARD_CACHE")
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaguard"
    return Path(cache) / aligned.fingerprint()[:32]
