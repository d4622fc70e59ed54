"""What was written and did not come to queue, taken up at a start and while the service runs."""

import logging
import time

from sqlalchemy import select

from deltaguard.service.patience import patient
from deltaguard.service.publishing import remove_discarded, remove_leftovers
from deltaguard.service.tables import DECISIONS, UNFINISHED, Job, now
from deltaguard.service.workflow import TOLD, Workflows

_DAY_S, _HOUR_S = 86_400, 3600

_AGAIN_S = 60.0
"""Seconds between two looks for what was not queued."""

_LOGGER = logging.getLogger(__name__)


def take_up(workflows: Workflows) -> None:
    """Go on with whatever a kill came before.

    Args:
        workflows: of a service that starts.
    """
    service = workflows.service
    with service.sessions.reading() as session:
        decided = session.execute(select(Job.id, Job.review).where(Job.review.in_(DECISIONS))).all()
    for job_id, decision in decided:
        # A kill may have come between the decision and this.
        if decision == "discarded":
            remove_discarded(service, job_id)
        else:
            remove_leftovers(service.job(job_id))
    queue_all(workflows, ended_within_s=_DAY_S)


def keep_queued(workflows: Workflows) -> None:
    """Look every minute, without end, for what was written just before the database was away.

    Args:
        workflows: of a service that runs.
    """
    while True:
        time.sleep(_AGAIN_S)
        try:
            patient(queue_all)(workflows, ended_within_s=_HOUR_S)
        except Exception:
            # The last stop: such as a disk that is full, where DBOS notes what is queued.
            _LOGGER.exception("What was not queued could not be looked for")


def queue_all(workflows: Workflows, *, ended_within_s: float) -> None:
    """Queue every unfinished job, and the message that one has ended, unless they are queued or were.

    Args:
        workflows: whose queues these are.
        ended_within_s: how many seconds ago a job may have ended of which the operator is told.
    """
    with workflows.service.sessions.reading() as session:
        waiting = Job.status.in_([state for state in UNFINISHED if state != "paused"])
        ids = session.scalars(select(Job.id).where(waiting).order_by(Job.number)).all()
        recent = Job.finished_at > now() - ended_within_s
        ended = session.execute(select(Job.id, Job.status).where(recent, Job.status.in_(TOLD))).all()
    for job_id in ids:
        workflows.begin(job_id)
    for job_id, status in ended:
        workflows.notify(job_id, status)
