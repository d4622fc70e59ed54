"""From a job's folder to a published model: its name, its place, and what is left over."""

import re
import shutil
from pathlib import Path

from deltaguard.models.durable import flush_folder
from deltaguard.service.tables import Job
from deltaguard.service.tasks import CHECKPOINTS, FINETUNED, RESTORED


def model_name(job: Job) -> str:
    """Name a job's model as OpenAI does: `ft:BASE:ORGANISATION:SUFFIX:ID`.

    Whatever the suffix is, the name holds letters, digits, hyphens, dots and underscores of it.

    Example:
        >>> model_name(Job(id="ftjob-0123456789", model="smollm2", organisation="acme", suffix="../it's 🙂"))
        'ft:smollm2:acme:it-s:01234567'
    """
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", job.suffix or "").strip(".-_")
    return f"ft:{job.model}:{job.organisation}:{suffix}:{job.id.removeprefix('ftjob-')[:8]}"


def move_into_place(job_folder: Path, target: Path) -> None:
    """Move a restored model out of its job's folder, unless that was done before."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    (job_folder / RESTORED).rename(target)
    flush_folder(target.parent)


def remove_leftovers(job_folder: Path) -> None:
    """Remove what a job whose model is published does not need: above all the model that was not restored."""
    for name in (FINETUNED, CHECKPOINTS):
        shutil.rmtree(job_folder / name, ignore_errors=True)
