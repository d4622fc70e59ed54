"""Models that the gate blocked, for operators: why, and whether they are released or discarded.

A decision is an event of the job, with who decided and why; the customer sees it as well.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from deltaguard.service.context import Caller, Open, Operating, Service
from deltaguard.service.errors import ApiError, not_found
from deltaguard.service.events import tell
from deltaguard.service.jobs import show_job
from deltaguard.service.paging import After, Limit, page
from deltaguard.service.publishing import publish_model, remove_discarded, remove_leftovers
from deltaguard.service.schemas import Given, JobObject, Page, Text
from deltaguard.service.tables import Event, Job

router = APIRouter(prefix="/v1/operator/blocked", tags=["operation"])

Decision = Literal["released", "discarded"]


class BlockedObject(BaseModel):
    """A job whose model waits for an operator, and what the gate found.

    Attributes:
        job: the job; its error says which check failed.
        checks: data of the gate's `moderation_checks` events.
    """

    job: JobObject
    checks: list[dict[str, Any]]


class Decide(Given):
    """Why an operator decides as they do; everybody who sees the job's events reads it."""

    reason: Annotated[Text, Field(min_length=1, max_length=1000)]


def checks_of(session: Session, job_id: str) -> list[dict[str, Any]]:
    """List what the gate found of a job's model, in the order in which it was told."""
    query = select(Event.data).where(Event.job_id == job_id, Event.type == "moderation_checks")
    return [dict(data) for data in session.scalars(query.order_by(Event.number)) if data is not None]


def blocked_jobs(session: Session) -> Sequence[Job]:
    """List the jobs of all organisations whose models wait for an operator, the newest first."""
    return session.scalars(select(Job).where(Job.review == "waiting").order_by(Job.number.desc())).all()


def release_model(service: Service, caller: Caller, job_id: str, *, reason: str) -> Job:
    """Publish the restored model of a job although the gate blocked it.

    Args:
        service: the service.
        caller: the operator who decides.
        job_id: of any organisation.
        reason: why; told in an event, with the id of the operator's key.

    Returns:
        The job, which has succeeded.

    Raises:
        ApiError: the caller is no operator, there is no such job, or its model does not wait for a decision.
    """
    with service.sessions.begin() as session:
        job = _decided(session, caller, job_id, "released", reason)
        # What failed the gate has kept its metrics.
        publish_model(service, session, job, None)
    remove_leftovers(service.job(job_id))
    return job


def discard_model(service: Service, caller: Caller, job_id: str, *, reason: str) -> Job:
    """Remove the models of a job that the gate blocked, for good; the job stays failed.

    The arguments, and what is raised, are those of `release_model`.
    """
    with service.sessions.begin() as session:
        job = _decided(session, caller, job_id, "discarded", reason)
    remove_discarded(service, job_id)
    return job


def _decided(session: Session, caller: Caller, job_id: str, decision: Decision, reason: str) -> Job:
    if not caller.is_operator:
        raise ApiError(403, "Only an operator decides about a model.", code="not_an_operator")
    # Of two decisions at once, the second sees the first.
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise not_found("fine-tuning job", job_id)
    if job.review != "waiting":
        state = f"was {job.review} before" if job.review else "is not blocked by the gate"
        raise ApiError(400, f"The model of {job_id} {state}.", code="not_blocked", param="job_id")
    job.review = decision
    tell(
        session,
        job_id,
        "review",
        f"An operator {decision} the model that did not pass the gate: {reason}",
        level="warn",
        data={"decision": decision, "by": caller.key_id, "reason": reason},
    )
    return job


@router.get("")
def list_blocked(
    service: Open, _caller: Operating, after: After = None, limit: Limit = 20
) -> Page[BlockedObject]:
    """List the models of all organisations that wait for a decision, with what the gate found."""
    with service.sessions.reading() as session:

        def show(job: Job) -> BlockedObject:
            return BlockedObject(job=show_job(job), checks=checks_of(session, job.id))

        return page(session, Job, show, Job.review == "waiting", after=after, limit=limit)


@router.post("/{job_id}/release")
def release(service: Open, caller: Operating, request: Request, job_id: str, asked: Decide) -> JobObject:
    """Publish a blocked model."""
    job = release_model(service, caller, job_id, reason=asked.reason)
    request.app.state.workflows.notify(job.id, job.status)
    return show_job(job)


@router.post("/{job_id}/discard")
def discard(service: Open, caller: Operating, job_id: str, asked: Decide) -> JobObject:
    """Remove a blocked model for good."""
    return show_job(discard_model(service, caller, job_id, reason=asked.reason))
