"""A job from its files to a published model, as durable workflows: no restart does twice what was done.

Two workflows of DBOS make a job. `validate` looks at its files, several jobs at a time. `fine_tune` trains,
restores, asks and publishes, as many jobs at a time as the settings say. Each step looks at the job first and
ends the workflow where it was cancelled or paused; each can be carried out again without doing anything
twice, since a kill may come between its end and the note that it ended. A job's state changes in one
transaction with the event that tells of it.
"""

import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dbos import DBOS, DBOSConfig, DBOSConfiguredInstance, SetEnqueueOptions, SetWorkflowID
from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from deltaguard.errors import DeltaguardError
from deltaguard.service.assignments import (
    calibrate_task,
    examine_task,
    moderate_task,
    restore_task,
    train_task,
)
from deltaguard.service.context import Service
from deltaguard.service.database import make_engine
from deltaguard.service.errors import OUTAGES, cause_of
from deltaguard.service.events import tell
from deltaguard.service.executors.executor import Executor, Step
from deltaguard.service.files import add_result, keep_result
from deltaguard.service.patience import AWAY, patient
from deltaguard.service.process import StoppedError, run_task
from deltaguard.service.publishing import publish_model, remove_leftovers
from deltaguard.service.schemas import JobError
from deltaguard.service.tables import UNFINISHED, Job, now
from deltaguard.service.tasks import BLOCKED, OPERATORS_BUSINESS, AnyTask, Kind, Told
from deltaguard.service.training_data import InvalidFileError, check_file
from deltaguard.service.webhooks import UndeliveredError, deliver, message_of
from deltaguard.text import shortened

P = ParamSpec("P")
T = TypeVar("T")

_VALIDATION, _TRAINING, _NOTIFICATION = "validation", "training", "notification"
TOLD = ("succeeded", "failed", "cancelled")
"""States of which an operator's server is told."""

_VALIDATED_AT_ONCE = 2
_NOTIFIED_AT_ONCE, _NOTIFIED_TIMES = 4, 15
_LONGEST_WAIT_S = 3600
_LOOK_S = 0.5
_FIRST, _LONGEST_ERROR = 1, 3000
"""Number of a job's first run; characters of what is said of one that failed."""

_SAME_VERSION = "4"
"""DBOS goes on only with workflows of its own version; raised where the order of steps changes."""

_LOGGER = logging.getLogger(__name__)


def _step(function: Callable[P, T]) -> Callable[P, T]:
    """Make a step of a method that does nothing twice; retries of DBOS would keep every error."""
    return DBOS.step()(patient(function))


def launch(service: Service, database_url: str, executor: Executor) -> "Workflows":
    """Start DBOS, which goes on with what an earlier service left unfinished.

    Args:
        service: the service; one to a process.
        database_url: of its database, which DBOS shares where that is Postgres.
        executor: runs the processes of jobs.
    """
    is_sqlite = make_url(database_url).get_backend_name() == "sqlite"
    config = DBOSConfig(
        name="deltaguard",
        # DBOS locks its tables for longer than requests should wait.
        system_database_url=f"sqlite:///{(service.data / 'workflows.sqlite').absolute()}"
        if is_sqlite
        else database_url,
        # Its own would take a Postgres that only reads for a bug.
        system_database_engine=None if is_sqlite else make_engine(database_url),
        application_version=_SAME_VERSION,
        executor_id="deltaguard-serve",
        log_level="WARNING",
        enable_otlp=False,
    )
    DBOS(config=config)
    workflows = Workflows(service, executor)
    DBOS.launch()
    DBOS.register_queue(_VALIDATION, worker_concurrency=_VALIDATED_AT_ONCE, polling_interval_sec=_LOOK_S)
    at_once = service.settings.jobs_at_once or executor.places
    DBOS.register_queue(_TRAINING, worker_concurrency=at_once, polling_interval_sec=_LOOK_S)
    DBOS.register_queue(_NOTIFICATION, worker_concurrency=_NOTIFIED_AT_ONCE, polling_interval_sec=_LOOK_S)
    return workflows


@DBOS.dbos_class()
class Workflows(DBOSConfiguredInstance):
    """The workflows of a service.

    Attributes:
        service: the service.
        executor: runs the processes of jobs.
    """

    def __init__(self, service: Service, executor: Executor) -> None:
        super().__init__(config_name="service")
        self.service, self.executor = service, executor
        self._calibrating = dict[str | None, threading.Lock]()

    def begin(self, job_id: str) -> None:
        """Put a job into its queue, unless it is there or was: an id is taken once."""
        with self.service.sessions.reading() as session:
            job = _job(session, job_id)
        if job.status == "validating_files":
            with SetWorkflowID(f"{job_id} validate, version {_SAME_VERSION}"):
                DBOS.enqueue_workflow(_VALIDATION, self.validate, job_id)
        else:
            self._queue(job_id, run=job.runs)

    def _queue(self, job_id: str, *, run: int) -> None:
        # What another version left is never gone on with: begun anew, it goes on from what its steps left.
        with SetWorkflowID(f"{job_id} run {run}, version {_SAME_VERSION}"):
            DBOS.enqueue_workflow(_TRAINING, self.fine_tune, job_id, run)

    def notify(self, job_id: str, status: str) -> None:
        """Have the operator's server told that a job has ended, once, where there is one."""
        if self.service.settings.webhook is not None and status in TOLD:
            with SetWorkflowID(_notification(job_id, status, 1)):
                DBOS.enqueue_workflow(_NOTIFICATION, self.tell_operator, job_id, status)

    @DBOS.workflow(max_recovery_attempts=None)
    def validate(self, job_id: str) -> None:
        """Look at a job's files, and queue it."""
        if self._carried_out(self.check_files, job_id, _FIRST):
            patient(self._queue)(job_id, run=_FIRST)
        else:
            self.notify(job_id, self.status(job_id))

    @DBOS.workflow(max_recovery_attempts=None)
    def fine_tune(self, job_id: str, run: int) -> None:
        """Carry a job out: moderate its rows, calibrate, train, restore, examine, publish.

        A run that was paused ends, even where the job was resumed before it looked: the next one goes on.
        """
        prepared = (self.start, self.moderate, self.calibrate)
        for step in (*prepared, self.train, self.restore, self.examine, self.publish):
            if not self._carried_out(step, job_id, run):
                break
        self.tidy(job_id)
        self.notify(job_id, self.status(job_id))

    @DBOS.workflow(max_recovery_attempts=None)
    def tell_operator(self, job_id: str, status: str, attempt: int = 1) -> None:
        """Tell the operator's server, again and again over four hours until it has taken the message.

        What is tried again later is queued anew, so that one message that is not taken holds up no other.
        """
        try:
            self.deliver(job_id, status)
        except (DeltaguardError, *OUTAGES) as error:
            may_pass = isinstance(error, (UndeliveredError, *OUTAGES))
            if not may_pass or attempt == _NOTIFIED_TIMES:
                _LOGGER.error("That %s has %s was not told: %s", job_id, status, cause_of(error))  # noqa: TRY400  # expected
                return
            later = SetEnqueueOptions(delay_seconds=min(2**attempt, _LONGEST_WAIT_S))
            with SetWorkflowID(_notification(job_id, status, attempt + 1)), later:
                DBOS.enqueue_workflow(_NOTIFICATION, self.tell_operator, job_id, status, attempt + 1)

    @_step
    def tidy(self, job_id: str) -> None:
        """Remove what a job that ended without a model does not need; an operator may still release one."""
        with self.service.sessions.reading() as session:
            job = _job(session, job_id)
        if job.status in ("failed", "cancelled") and job.review != "waiting":
            remove_leftovers(self.service.job(job_id))

    @_step
    def status(self, job_id: str) -> str:
        """Look up a job's state."""
        with self.service.sessions.reading() as session:
            return _job(session, job_id).status

    @DBOS.step()
    def deliver(self, job_id: str, status: str) -> None:
        """Send the message that a job has ended."""
        webhook = self.service.settings.webhook
        if webhook is not None:
            with self.service.sessions.reading() as session:
                job = _job(session, job_id)
            # Not where an operator has released it since: that is told by itself.
            if job.status == status:
                deliver(webhook, message_of(job, status))

    def _carried_out(self, step: Callable[[str, int], bool], job_id: str, run: int) -> bool:
        try:
            return step(job_id, run)
        except (DeltaguardError, OSError, *OUTAGES) as error:
            # Such as a disk that is full, also where DBOS notes what a step gave; its message names places on
            # this machine.
            _LOGGER.error("The job %s cannot go on: %s", job_id, cause_of(error))  # noqa: TRY400  # no bug
            self.end_by_machine(job_id, run)
            return False
        except Exception:
            # The last stop: the job ends with a message, and the service goes on with others.
            _LOGGER.exception("A bug, in job %s", job_id)
            self.end_by_bug(job_id, run)
            return False

    @_step
    def check_files(self, job_id: str, run: int) -> bool:
        """Look for lines that cannot be learned from."""
        job = self._open_job(job_id, run)
        if job is None:
            return False
        for param in ("training_file", "validation_file"):
            file_id: str | None = getattr(job, param)
            try:
                if file_id is not None:
                    file = self.service.fetched(job_id, file_id)
                    check_file(file, self.service.settings.limits, method=job.method)
            except InvalidFileError as error:
                return self._failed(
                    job_id, run, JobError(code=f"invalid_{param}", message=str(error), param=param)
                )
            except FileNotFoundError:
                error = JobError(code=f"invalid_{param}", message=f"{file_id} was deleted.", param=param)
                return self._failed(job_id, run, error)
        with self.service.sessions.begin() as session:
            job = _job(session, job_id, to_change=True)
            if job.status == "validating_files":
                job.status = "queued"
                tell(session, job_id, "validated", "Files validated, job queued.")
        return job.status == "queued"

    @_step
    def start(self, job_id: str, run: int) -> bool:
        """Say that a job's turn has come."""
        with self.service.sessions.begin() as session:
            job = _job(session, job_id, to_change=True)
            if job.status == "queued" and job.runs == run:
                job.status = "running"
                tell(session, job_id, f"started {run}", "Fine-tuning job started.")
        return job.status == "running" and job.runs == run

    @_step
    def moderate(self, job_id: str, run: int) -> bool:
        """Have a judge look at the training rows, where the operator wants that."""
        return self._done(job_id, run, "moderate", moderate_task)

    @_step
    def calibrate(self, job_id: str, run: int) -> bool:
        """Make sure that the aligned model's store is there."""
        job = self._open_job(job_id, run)
        model = None if job is None else self.service.settings.models.get(job.model)
        # One at a time: locks of storage that machines share may not keep two from making the same store.
        lock = self._calibrating.setdefault(model, threading.Lock())
        while not lock.acquire(timeout=_LOOK_S):
            if self._open_job(job_id, run) is None:
                # Which stops what an earlier service left of it.
                return self._done(job_id, run, "calibrate", calibrate_task)
        try:
            return self._done(job_id, run, "calibrate", calibrate_task)
        finally:
            lock.release()

    @_step
    def train(self, job_id: str, run: int) -> bool:
        """Fine-tune the aligned model on the customer's file."""
        return self._done(job_id, run, "train", train_task)

    @_step
    def restore(self, job_id: str, run: int) -> bool:
        """Give the fine-tuned model its refusals back."""
        return self._done(job_id, run, "restore", restore_task)

    @_step
    def examine(self, job_id: str, run: int) -> bool:
        """Ask all three models; what fails a check goes no further."""
        return self._done(job_id, run, "examine", examine_task)

    @_step
    def publish(self, job_id: str, run: int) -> bool:
        """Give the restored model its name; from then on it can be asked."""
        result = keep_result(self.service, job_id)
        with self.service.sessions.begin() as session:
            job = _job(session, job_id, to_change=True)
            if job.status == "running" and job.runs == run:
                publish_model(self.service, session, job, result)
        # After a kill between success and this, too.
        if job.status == "succeeded":
            remove_leftovers(self.service.job(job_id))
        return job.status == "succeeded"

    @_step
    def end_by_machine(self, job_id: str, run: int) -> None:
        """End a job that the machine has no room for, or does not let go on otherwise."""
        self._failed(job_id, run, JobError(code="server_error", message=OPERATORS_BUSINESS))

    @_step
    def end_by_bug(self, job_id: str, run: int) -> None:
        """End a job in which something happened that no step knows."""
        message = "This is a bug of the service. Its operator finds it in the log."
        self._failed(job_id, run, JobError(code="server_error", message=message))

    def _open_job(self, job_id: str, run: int) -> Job | None:
        """Find a job, None where this run of it is not to go on."""
        with self.service.sessions.reading() as session:
            job = _job(session, job_id)
        goes_on = job.status in ("validating_files", "queued", "running") and job.runs == run
        return job if goes_on else None

    def _done(
        self, job_id: str, run: int, kind: Kind, task_of: Callable[[Service, Job], AnyTask | None]
    ) -> bool:
        """Carry out a task of a job, if there is one, and say whether the job goes on."""
        folder, cache = self.service.job(job_id), self.service.data / "cache"
        job = self._open_job(job_id, run)
        if job is None:
            # It was cancelled or paused, and the service ended before it had stopped the process.
            self.executor.stop_leftovers(Step(kind, folder, cache))
            return False
        if job.model not in self.service.settings.models:
            self.executor.stop_leftovers(Step(kind, folder, cache))
            message = f"The service does not have the model {job.model!r} any more."
            return self._failed(job_id, run, JobError(code="model_not_found", message=message, param="model"))

        task = task_of(self.service, job)
        if task is None:
            return True

        def note(told: Told) -> None:
            with self.service.sessions.begin() as session:
                tell(session, job_id, **told.model_dump())

        try:
            outcome = run_task(
                task,
                folder,
                executor=self.executor,
                cache=cache,
                tell=note,
                may_go_on=lambda: self._open_job(job_id, run) is not None,
            )
        except StoppedError:
            return False
        except Exception as error:
            # After an outage the step begins again, and finds its process.
            if not isinstance(error, AWAY):
                self.executor.stop_leftovers(Step(kind, folder, cache))
            raise
        if outcome.reason is not None:
            _LOGGER.error("The job %s cannot go on: %s", job_id, outcome.reason)
        return True if outcome.error is None else self._failed(job_id, run, outcome.error)

    def _failed(self, job_id: str, run: int, error: JobError) -> bool:
        """End a job with an error, unless it or this run of it has ended."""
        result = keep_result(self.service, job_id)
        told = error.model_copy(update={"message": shortened(error.message, _LONGEST_ERROR)})
        with self.service.sessions.begin() as session:
            job = _job(session, job_id, to_change=True)
            if job.status in UNFINISHED and job.runs == run:
                job.status, job.finished_at, job.error = "failed", now(), told.model_dump()
                job.review = "waiting" if error.code.startswith(BLOCKED) else None
                if result is not None:
                    add_result(session, job, result)
                tell(session, job_id, "failed", f"The job failed: {told.message}", level="error")
        return False


def _notification(job_id: str, status: str, attempt: int) -> str:
    """Name a try to tell the operator; what another version left is never gone on with."""
    return f"{job_id} notify {status}, {attempt}, version {_SAME_VERSION}"


def _job(session: Session, job_id: str, *, to_change: bool = False) -> Job:
    """Find a job; nobody else changes one that is `to_change` until the session commits."""
    query = select(Job).where(Job.id == job_id)
    return session.scalars(query.with_for_update() if to_change else query).one()
