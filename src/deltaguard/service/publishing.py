"""From a job's folder to a published model: its name, its place, and what is left over."""

import re
import shutil
from pathlib import Path

from sqlalchemy.orm import Session

from deltaguard.models.durable import flush_folder
from deltaguard.service.context import Service
from deltaguard.service.events import tell
from deltaguard.service.files import add_result
from deltaguard.service.tables import Job, Model, now
from deltaguard.service.tasks import CHECKPOINTS, FILES, FINETUNED, RESTORED, Outcome


def model_name(job: Job) -> str:
    """Name a job's model as OpenAI does: `ft:BASE:ORGANISATION:SUFFIX:ID`.

    Whatever the suffix is, the name holds letters, digits, hyphens, dots and underscores of it.

    Example:
        >>> model_name(Job(id="ftjob-0123456789", model="smollm2", organisation="acme", suffix="../it's 🙂"))
        'ft:smollm2:acme:it-s:01234567'
    """
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", job.suffix or "").strip(".-_")
    return f"ft:{job.model}:{job.organisation}:{suffix}:{job.id.removeprefix('ftjob-')[:8]}"


def publish_model(service: Service, session: Session, job: Job, result: int | None) -> None:
    """Give a job's restored model its place and its name, and end the job; the caller commits.

    Args:
        service: the service.
        session: of the database; nobody else changes the job until it commits.
        job: the job.
        result: bytes of its metrics, as `keep_result` gives them.
    """
    folder, name = service.job(job.id), model_name(job)
    _move_into_place(folder / RESTORED, service.published(job.id))
    trained = Outcome.model_validate_json((folder / "train.outcome.json").read_bytes()).data
    step: int = trained["steps"]
    session.add(Model(id=name, organisation=job.organisation, base=job.model, job_id=job.id, step=step))
    if result is not None:
        add_result(session, job, result)
    job.status, job.finished_at, job.fine_tuned_model, job.error = "succeeded", now(), name, None
    job.trained_tokens = trained["trained_tokens"]
    tell(session, job.id, "published", f"New fine-tuned model created: {name}")
    tell(session, job.id, "succeeded", "The job has successfully completed.")


def _move_into_place(source: Path, target: Path) -> None:
    """Move a model, unless that was done before: a kill may come between the move and the commit."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    flush_folder(target.parent)


def remove_discarded(service: Service, job_id: str) -> None:
    """Remove every model of a job whose model an operator discarded."""
    remove_leftovers(service.job(job_id))
    # There, too, where a release had moved it before its commit failed.
    for folder in (service.job(job_id) / RESTORED, service.published(job_id)):
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(job_folder: Path) -> None:
    """Remove what a job that has ended does not need: the model that was not restored, and its data."""
    for name in (FINETUNED, CHECKPOINTS, FILES):
        shutil.rmtree(job_folder / name, ignore_errors=True)
