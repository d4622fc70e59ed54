"""The inputs of a restore, opened: headers are read, weights are not."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaguard.curvature import Rank
from deltaguard.curvature.request import prompts_key
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import MANIFEST, not_full
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import expanded
from deltaguard.methods.method import Role
from deltaguard.models.adapter import AdapterCheckpoint, is_adapter
from deltaguard.models.checkpoint import Checkpoint, WeightSource
from deltaguard.models.identity import ModelIdentity
from deltaguard.models.opened import Snapshot, refuse_changes
from deltaguard.reports.records.base import ModelReference
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Plan, make_plan


@dataclass(frozen=True)
class Other:
    """A further model.

    Attributes:
        source: the model.
        names: its names of the aligned model's tensors.
    """

    source: WeightSource
    names: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """A pair of models and, where the method needs it, the aligned one's curvature.

    Attributes:
        aligned: the aligned model.
        finetuned: the fine-tuned one.
        store: the curvature, None where it is not needed or not there.
        aligned_identity: what identifies the aligned model.
        finetuned_identity: what identifies the fine-tuned one.
        others: further models that the method needs, by role.
        asked: the file of the user's requests, if there is one, as it was before it was read.
    """

    aligned: Checkpoint
    finetuned: WeightSource
    store: CurvatureStore | None
    aligned_identity: ModelIdentity
    finetuned_identity: ModelIdentity
    others: Mapping[Role, Other]
    asked: Snapshot

    @property
    def aligned_reference(self) -> ModelReference:
        """The aligned model for a report."""
        return _reference(self.aligned, self.aligned_identity)

    @property
    def finetuned_reference(self) -> ModelReference:
        """The fine-tuned model for a report."""
        return _reference(self.finetuned, self.finetuned_identity)

    def plan(self, config: RestoreConfig) -> Plan:
        """Decide what would be done, from headers alone."""
        return make_plan(
            self.aligned,
            self.finetuned,
            store=self.store,
            other_params=config.other_params,
            rank=config.rank,
            everywhere=config.chosen_method.everywhere,
        )

    def check_unchanged(self) -> None:
        """Refuse to go on where an input was replaced or written to since it was opened.

        Raises:
            DeltaguardError: files changed; all are listed.
        """
        changes = self.aligned.changes() + self.finetuned.changes()
        changes += [change for other in self.others.values() for change in other.source.changes()]
        changes += self.asked.changes() + (self.store.changes() if self.store else [])
        refuse_changes(dict.fromkeys(changes))


def open_finetuned(aligned: Checkpoint, finetuned: str | Path) -> WeightSource:
    """Open a fine-tuned model, which may be an adapter over the aligned one.

    Args:
        aligned: the aligned model.
        finetuned: a local folder, a Hub id, `id@revision`, or a PEFT LoRA adapter.

    Raises:
        DeltaguardError: it cannot be used.
    """
    if is_adapter(finetuned):
        return AdapterCheckpoint.open(aligned, finetuned)
    return Checkpoint.open(finetuned)


def open_models(aligned: str | Path, finetuned: str | Path) -> tuple[Checkpoint, WeightSource]:
    """Open an aligned model and a fine-tuned one, which may be an adapter.

    Args:
        aligned: a local folder, a Hub id, or `id@revision`.
        finetuned: the same, or a PEFT LoRA adapter.

    Raises:
        DeltaguardError: one of them cannot be used.
    """
    base = Checkpoint.open(aligned)
    return base, open_finetuned(base, finetuned)


def find_store(
    aligned: Checkpoint,
    identity: ModelIdentity,
    store: CurvatureStore | str | Path | None,
    *,
    rank: Rank,
) -> CurvatureStore | None:
    """Open the store that was named, else the one in `default_store_folder`, if there is one.

    Args:
        aligned: the model that it must have been made for.
        identity: of that model.
        store: the store or where it lies.
        rank: what it must keep.

    Raises:
        DeltaguardError: a store was named and cannot be opened, belongs to another model, or does not keep
            what is needed.
    """
    if isinstance(store, CurvatureStore):
        known = store
    elif store is not None:
        known = CurvatureStore.from_pretrained(store)
    else:
        folder = default_store_folder(identity, rank)
        if not (folder / MANIFEST).is_file():
            return None
        known = _kept_store(folder, aligned)
    made_for = known.provenance
    if problems := made_for.differences(identity):
        title = f"The store {known.folder} was made for {made_for.aligned}, which was another model than"
        raise DeltaguardError(
            f"{listed(f'{title} {aligned.reference} is', problems)}\n"
            f"Run `deltaguard calibrate {aligned.reference} -o STORE` for this model."
        )
    if rank == "full" and not known.is_full:
        raise DeltaguardError(not_full(known.folder, known.provenance.aligned))
    return known


def _kept_store(folder: Path, aligned: Checkpoint) -> CurvatureStore:
    try:
        return CurvatureStore.from_pretrained(folder)
    except DeltaguardError as error:
        raise DeltaguardError(
            f"{error}\nThis is what was kept of an earlier calibration of {aligned.reference}. "
            f"Delete {folder} and run the same command again: it is made anew."
        ) from error


_ARITHMETIC = "2"
"""Rises with every change of what a calibration computes from the same answers."""


def default_store_folder(aligned: ModelIdentity, rank: Rank) -> Path:
    """Name the folder in which a model's store is kept if none is named.

    There is one for each identity, rank, and release that asks other prompts or computes otherwise.
    """
    return cache_folder() / f"{aligned.key[:32]}-{prompts_key()}-{_ARITHMETIC}-{rank}"


def cache_folder() -> Path:
    """Name the folder of what is kept of aligned models for further runs.

    It is `DELTAGUARD_CACHE`, else `XDG_CACHE_HOME/deltaguard`, else `~/.cache/deltaguard`; a variable that is
    empty counts as none.
    """
    if own := os.environ.get("DELTAGUARD_CACHE"):
        return expanded(own)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "deltaguard"


def _reference(source: WeightSource, identity: ModelIdentity) -> ModelReference:
    return ModelReference(reference=source.reference, **identity.model_dump())
