"""Jobs: made once, listed, cancelled, paused and resumed. `workflow.py` carries them out."""

import json
import re
from hashlib import sha256
from secrets import randbelow
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from sqlalchemy import Text, cast, func, select
from sqlalchemy.orm import Session

from deltaguard.service.context import Asking, Caller, Making, Open, Service
from deltaguard.service.database import new_id
from deltaguard.service.errors import ApiError, not_found
from deltaguard.service.events import show_event, tell
from deltaguard.service.files import find_file
from deltaguard.service.keys import wait_for_others
from deltaguard.service.paging import After, Limit, page
from deltaguard.service.schemas import (
    METADATA_KEY,
    CheckpointMetrics,
    CheckpointObject,
    CreateJob,
    EventObject,
    JobError,
    JobMethod,
    JobObject,
    Page,
)
from deltaguard.service.tables import UNFINISHED, Event, Job, Model, now

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

_SAME_REQUEST_S = 120
"""A client repeats a request within a minute or so, and not after that."""

_MOST_FILTERS = 16
_FILTER, _METADATA_KEY = re.compile(r"metadata\[(.+)\]", re.DOTALL), re.compile(METADATA_KEY)


def find_job(session: Session, caller: Caller, job_id: str, *, to_change: bool = False) -> Job:
    """Find a job of an organisation.

    Args:
        session: of the database.
        caller: who is asking.
        job_id: of the job.
        to_change: whether others wait with changes of it until the session commits.

    Raises:
        ApiError: there is none of that id, or it is another organisation's.
    """
    query = select(Job).where(Job.id == job_id, Job.organisation == caller.organisation)
    found = session.scalar(query.with_for_update() if to_change else query)
    if found is None:
        raise not_found("fine-tuning job", job_id)
    return found


def show_job(job: Job) -> JobObject:
    """Write a job as the API does."""
    return JobObject(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.organisation,
        status=job.status,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=[] if job.result_file is None else [job.result_file],
        hyperparameters=job.hyperparameters,
        method=JobMethod.model_validate(
            {"type": job.method, job.method: {"hyperparameters": job.hyperparameters}}
        ),
        seed=job.seed,
        trained_tokens=job.trained_tokens,
        error=None if job.error is None else JobError(**job.error),
        metadata=job.user_metadata,
    )


@router.post("")
def create_job(
    service: Open,
    caller: Making,
    request: Request,
    asked: CreateJob,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    x_stainless_retry_count: Annotated[int, Header(ge=0)] = 0,
) -> JobObject:
    """Make a job; the same request, sent again by the client itself, gives the job that exists."""
    digest = _digest(asked, caller)
    once = None if idempotency_key is None else f"{caller.organisation}:{idempotency_key}"
    with service.sessions.begin() as session:
        wait_for_others(session, caller.organisation)
        job = _made_before(session, digest, once, is_retry=x_stainless_retry_count > 0)
        if job is None:
            job = _new_job(service, session, caller, asked)
            job.request_sha256, job.idempotency_key = digest, once
            session.add(job)
            session.flush()
            tell(session, job.id, "created", "Created fine-tuning job.")
    # Of a job that exists, too: what failed after its row was written may have been this.
    if job.status in UNFINISHED and job.status != "paused":
        request.app.state.workflows.begin(job.id)
    return show_job(job)


def _digest(asked: CreateJob, caller: Caller) -> str:
    """Hash what is asked for, and by which key."""
    return sha256(json.dumps([caller.key_id, asked.model_dump()], sort_keys=True).encode()).hexdigest()


def _made_before(session: Session, digest: str, once: str | None, *, is_retry: bool) -> Job | None:
    """Find the job that the same request made.

    Raises:
        ApiError: another request had the same idempotency key.
    """
    if once is not None:
        known = session.scalar(select(Job).where(Job.idempotency_key == once))
        if known is not None and known.request_sha256 != digest:
            message = "This Idempotency-Key came with another request before. Take a new key."
            raise ApiError(400, message, code="idempotency_key_reused")
        return known
    if not is_retry:
        return None
    recent = select(Job).where(Job.request_sha256 == digest, Job.created_at >= now() - _SAME_REQUEST_S)
    return session.scalar(recent.order_by(Job.number.desc()))


def _new_job(service: Service, session: Session, caller: Caller, asked: CreateJob) -> Job:
    """Make the row of a job.

    Raises:
        ApiError: the model or a file is not there, or there are too many jobs.
    """
    if asked.model not in service.settings.models:
        known = ", ".join(service.settings.models)
        message = f"{asked.model!r} cannot be fine-tuned; what can is {known}."
        raise ApiError(400, message, code="model_not_found", param="model")
    if asked.method is not None and asked.hyperparameters is not None:
        message = "`method` and `hyperparameters` both say how to train: give `method` alone."
        raise ApiError(400, message, code="invalid_request", param="hyperparameters")
    for field in ("training_file", "validation_file"):
        if (file_id := getattr(asked, field)) is not None:
            found = find_file(session, caller, file_id)
            if found.purpose != "fine-tune":
                message = f"{file_id} has the purpose {found.purpose}, and fine-tune is needed."
                raise ApiError(400, message, code="invalid_file", param=field)
    own = (Job.organisation == caller.organisation, Job.status.in_(UNFINISHED))
    most = service.settings.limits.unfinished_jobs
    if (session.scalar(select(func.count()).select_from(Job).where(*own)) or 0) >= most:
        message = f"This organisation has {most} jobs that are not finished, and may not have more."
        # Sent again by itself, it would be taken for the last job that was made of the same request.
        raise ApiError(429, message, code="too_many_jobs", retry_after=60, is_final=True)
    return Job(
        id=new_id("ftjob"),
        organisation=caller.organisation,
        status="validating_files",
        model=asked.model,
        method=asked.method.type if asked.method else "supervised",
        training_file=asked.training_file,
        validation_file=asked.validation_file,
        hyperparameters=_resolved(service, asked),
        seed=randbelow(2**31) if asked.seed is None else asked.seed,
        suffix=asked.suffix,
        user_metadata=asked.metadata,
        runs=1,
    )


def _resolved(service: Service, asked: CreateJob) -> dict[str, Any]:
    """Put numbers in the place of `auto`."""
    training = service.settings.training
    automatic = {
        "n_epochs": training.n_epochs,
        "batch_size": training.batch_size,
        "learning_rate_multiplier": 1.0,
        "beta": training.dpo_beta,
    }
    chosen = asked.chosen.model_dump()
    return {name: automatic[name] if value == "auto" else value for name, value in chosen.items()}


@router.get("")
def list_jobs(
    service: Open, caller: Asking, request: Request, after: After = None, limit: Limit = 20
) -> Page[JobObject]:
    """List an organisation's jobs; `metadata[key]=value` keeps some, `metadata=null` those without any."""
    where = [Job.organisation == caller.organisation]
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null":
                message = "metadata is null, or asked for by its keys: metadata[key]=value."
                raise ApiError(400, message, code="invalid_request", param="metadata")
            # A database's own null, of older rows, and JSON's.
            where.append(func.coalesce(cast(Job.user_metadata, Text), "null") == "null")
        if not name.startswith("metadata["):
            continue
        found = _FILTER.fullmatch(name)
        if not (found and _METADATA_KEY.fullmatch(found[1])):
            message = "Keys of metadata have 1 to 64 characters, and no quotation marks or backslashes."
            raise ApiError(400, message, code="invalid_request", param="metadata")
        if len(where) > _MOST_FILTERS:
            message = f"{_MOST_FILTERS} values of metadata are looked for at a time, at most."
            raise ApiError(400, message, code="invalid_request", param="metadata")
        where.append(Job.user_metadata[found[1]].as_string() == value)
    with service.sessions.reading() as session:
        return page(session, Job, show_job, *where, after=after, limit=limit)


@router.get("/{job_id}")
def retrieve_job(service: Open, caller: Asking, job_id: str) -> JobObject:
    """Describe a job."""
    with service.sessions.reading() as session:
        return show_job(find_job(session, caller, job_id))


@router.get("/{job_id}/events")
def list_events(
    service: Open, caller: Asking, job_id: str, after: After = None, limit: Limit = 20
) -> Page[EventObject]:
    """List what happened to a job, the newest first."""
    with service.sessions.reading() as session:
        find_job(session, caller, job_id)
        return page(session, Event, show_event, Event.job_id == job_id, after=after, limit=limit)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    service: Open, caller: Asking, job_id: str, after: After = None, limit: Limit = 10
) -> Page[CheckpointObject]:
    """List the models that a job published: one, since what did not pass the gate cannot be asked."""
    with service.sessions.reading() as session:
        find_job(session, caller, job_id)
        loss = _validation_loss(session, job_id)

        def show(model: Model) -> CheckpointObject:
            return _show_checkpoint(model, loss)

        return page(session, Model, show, Model.job_id == job_id, after=after, limit=limit)


def _validation_loss(session: Session, job_id: str) -> float | None:
    """Find what the gate measured of the restored model on the validation file."""
    query = select(Event.data).where(Event.job_id == job_id, Event.once == "check validation_loss")
    data = session.scalar(query)
    return None if data is None else data["losses"]["restored"]


def _show_checkpoint(model: Model, loss: float | None) -> CheckpointObject:
    return CheckpointObject(
        id=f"ftckpt-{model.job_id.removeprefix('ftjob-')}",
        created_at=model.created_at,
        fine_tuning_job_id=model.job_id,
        fine_tuned_model_checkpoint=model.id,
        step_number=model.step,
        metrics=CheckpointMetrics(step=model.step, full_valid_loss=loss),
    )


@router.post("/{job_id}/cancel")
def cancel_job(service: Open, caller: Asking, request: Request, job_id: str) -> JobObject:
    """End a job at once; its training process is stopped."""
    with service.sessions.begin() as session:
        job = find_job(session, caller, job_id, to_change=True)
        if job.status not in UNFINISHED:
            message = f"The job is {job.status} already."
            raise ApiError(400, message, code="job_finished", param="job_id")
        job.status, job.finished_at = "cancelled", now()
        tell(session, job.id, "cancelled", "The job was cancelled.")
    # Here, too: of one that was paused, no workflow is left that would do it.
    request.app.state.workflows.notify(job.id, job.status)
    return show_job(job)


@router.post("/{job_id}/pause")
def pause_job(service: Open, caller: Asking, job_id: str) -> JobObject:
    """Stop a job until it is resumed; it gives its place to others, and training keeps its checkpoint."""
    with service.sessions.begin() as session:
        job = find_job(session, caller, job_id, to_change=True)
        if job.status not in ("queued", "running"):
            message = f"A job can be paused while it is queued or running; this one is {job.status}."
            raise ApiError(400, message, code="job_not_running", param="job_id")
        job.status = "paused"
        tell(session, job.id, f"paused {job.runs}", "The job was paused.")
        return show_job(job)


@router.post("/{job_id}/resume")
def resume_job(service: Open, caller: Asking, request: Request, job_id: str) -> JobObject:
    """Go on with a paused job where it stopped."""
    with service.sessions.begin() as session:
        job = find_job(session, caller, job_id, to_change=True)
        # What failed after the row was written may have been this.
        is_retry = job.status == "queued" and job.runs > 1
        if job.status != "paused" and not is_retry:
            message = f"The job is not paused but {job.status}."
            raise ApiError(400, message, code="job_not_paused", param="job_id")
        if not is_retry:
            job.status, job.runs = "queued", job.runs + 1
            tell(session, job.id, f"resumed {job.runs}", "The job was resumed.")
    request.app.state.workflows.begin(job.id)
    return show_job(job)
