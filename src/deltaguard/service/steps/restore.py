"""The restore of a job's model: deltaguard's own, with the store that all jobs of an aligned model share."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deltaguard.files import read_json
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.progress import Event
from deltaguard.reports.outcome import energy_kept
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore
from deltaguard.service.settings import restore_options
from deltaguard.service.tasks import FINETUNED, RESTORED, Outcome, Restore, Told
from deltaguard.service.worker import Tell


class _Trained(BaseModel):
    """What must be known of an adapter that was trained."""

    r: int


def restore_model(task: Restore, folder: Path, tell: Tell) -> Outcome:
    """Restore what was trained, or go on with it where an earlier process was interrupted.

    Raises:
        DeltaguardError: as `restore`.
    """
    finetuned = folder / FINETUNED
    rank = None
    if (finetuned / ADAPTER_CONFIG).exists():
        rank = read_json(finetuned / ADAPTER_CONFIG, _Trained, remedy="The training writes it.").r
    own: dict[str, Any] = {
        "device": task.device,
        **restore_options(task.options, lora_rank=rank),
        "resume": True,
    }
    # The service's own fine-tune has the aligned model's files, whatever transformers wrote into them.
    own.setdefault("config_from", "aligned")

    def on_progress(event: Event) -> None:
        if event.detail:
            tell(Told(once=f"restore {event.stage} {event.done} {event.detail}"[:100], message=event.detail))

    tell(Told(once="restore", message="Restoring the aligned model's refusals."))
    config = RestoreConfig.model_validate(own)
    report = restore(task.model, finetuned, folder / RESTORED, config=config, progress=on_progress)
    kept = f"{energy_kept(report)} of what training changed in the restored layers is kept"
    tell(Told(once="restored", message=f"Restored: {kept}.", data={"kept_energy": report.kept_energy}))
    return Outcome(data={"kept_energy": report.kept_energy})
