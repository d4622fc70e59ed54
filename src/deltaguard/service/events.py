"""What happens to a job, told once."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from deltaguard.service.database import new_id
from deltaguard.service.schemas import EventObject
from deltaguard.service.tables import Event
from deltaguard.text import shortened

_LONGEST = 4000


def tell(
    session: Session,
    job_id: str,
    once: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",  # noqa: A002  # the field's name in the API
    data: Mapping[str, Any] | None = None,
) -> None:
    """Tell what happened to a job, unless that was told before; the caller commits.

    Args:
        session: of the database.
        job_id: of the job.
        once: names what happened, within the job.
        message: in words.
        level: `info`, `warn` or `error`.
        type: `message`, `metrics` or `moderation_checks`.
        data: the same for programs.
    """
    if session.scalar(select(Event.number).where(Event.job_id == job_id, Event.once == once)) is None:
        said = shortened(message, _LONGEST)
        new = Event(id=new_id("ftevent"), job_id=job_id, once=once, message=said, level=level, type=type)
        new.data = None if data is None else dict(data)
        session.add(new)
        session.flush()


def show_event(event: Event) -> EventObject:
    """Write an event as the API does."""
    return EventObject(
        id=event.id,
        created_at=event.created_at,
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )
