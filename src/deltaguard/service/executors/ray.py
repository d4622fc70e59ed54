"""Processes as jobs of a Ray cluster (`ray job`), whose machines share the data folder.

Where a process goes, and that it waits for a free GPU, is Ray's business. What it tells and what came of it
are files in the job's folder, as on one machine. A process has an id that follows from job, step and attempt,
so that a service that was started anew finds it again; unlike a process of this machine it goes on without
the service. An id that the service stopped is not taken again: Ray may show it as waiting for long after.
"""

import logging
import os
import shlex
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.service.executors.executor import Ended, Step, describe_exit
from deltaguard.service.executors.local import OFFLINE
from deltaguard.service.settings import Ray
from deltaguard.service.worker import ALONE

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_LOOK_S = 1
_LOGS_S = 5
_STOP_S = 60
_NO_PLACE = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
_UNKNOWN = "status code 404"

_T = TypeVar("_T")

_LOGGER = logging.getLogger(__name__)


def connect(settings: Ray) -> "JobSubmissionClient":
    """Connect to a cluster.

    Args:
        settings: have its address, unless the environment variable RAY_ADDRESS has it, which goes first.

    Raises:
        MissingPackageError: ray is not installed, or without what submits jobs.
        DeltaguardError: there is no address, or no cluster answers there.
    """
    require_packages("Running jobs on Ray", "ray", "ray", "aiohttp")
    written = None if settings.address is None else str(settings.address)
    given = os.environ.get("RAY_ADDRESS") or written
    if given is None:
        raise DeltaguardError(
            "`executor: ray` needs the address of the cluster's Jobs API, such as http://head:8265, as "
            "`ray: {address: ...}` in service.yaml or in the environment variable RAY_ADDRESS."
        )
    if urlsplit(given).scheme not in ("http", "https"):
        raise DeltaguardError(
            f"The address of Ray is {given!r}, and has to be that of its Jobs API, such as http://head:8265."
        )
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(given.rstrip("/"))
    except (OSError, RuntimeError) as error:
        raise DeltaguardError(f"No Ray cluster that takes jobs answers at {given}: {error}") from error


class RayExecutor:
    """Runs each process as a job of a Ray cluster.

    Attributes:
        client: of the cluster.
        gpus: that are kept for each process.
    """

    def __init__(self, client: "JobSubmissionClient", *, gpus: float) -> None:
        self.client, self.gpus = client, gpus

    @property
    def places(self) -> int:
        """How many jobs are under way at a time: one, since what the cluster can take is not asked."""
        return 1

    def begin(self, step: Step, attempt: int) -> "RayJob":
        """Begin a process, unless one of that step and attempt goes on, or went on.

        Keys of judges are not among what it is told: Ray shows that to everybody. Workers have them in their
        own environment.
        """
        return RayJob(self, step, attempt)

    def stop_leftovers(self, step: Step) -> None:
        """End what an earlier service left of a step."""
        for attempt in count(1):
            job = RayJob(self, step, attempt)
            job.stop()
            if not job.is_known and not job.was_stopped:
                return

    def submit(
        self, submission_id: str, arguments: list[str], cache: Path, *, cpus: float, gpus: float
    ) -> None:
        """Have Ray run a module of Python on one of its machines."""
        hub = {name: os.environ[name] for name in ("HF_HOME",) if name in os.environ}
        self.client.submit_job(
            # In the place of the shell, so that a signal which ends it is seen.
            entrypoint=shlex.join(["exec", "python", "-m", *arguments]),
            submission_id=submission_id,
            runtime_env={"env_vars": {**OFFLINE, **hub, "DELTAGUARD_CACHE": str(cache)}},
            # With none it would run on the cluster's head.
            entrypoint_num_cpus=cpus,
            entrypoint_num_gpus=gpus,
        )

    def find(self, submission_id: str) -> "JobDetails | None":
        """Ask what Ray knows of a job; None where that is nothing."""
        try:
            return self.client.get_job_info(submission_id)
        except RuntimeError as error:
            if _UNKNOWN in str(error):
                return None
            raise


class RayJob:
    """A process that is a job of Ray.

    While the cluster does not answer, the process is taken to go on.

    Attributes:
        submission_id: by which Ray knows it.
        is_known: whether Ray knew it when it was last asked.
    """

    def __init__(self, executor: RayExecutor, step: Step, attempt: int) -> None:
        self.submission_id = f"deltaguard-{step.folder.name}-{step.kind}-{attempt}"
        self.is_known = False
        self._executor, self._step = executor, step
        self._log = step.folder / f"{step.kind}.{attempt}.log"
        self._stopped = step.folder / f"{step.kind}.{attempt}.stopped"
        self._looked_at = self._logged_at = -float("inf")
        self._troubles: set[str] = set()

    @property
    def was_stopped(self) -> bool:
        """Whether the service stopped it, or took note that it had ended."""
        return self._stopped.exists()

    def look(self) -> Ended | None:
        """Begin it, unless that was done, and say how it ended; None while it goes on, or nobody can tell."""
        if self.was_stopped:
            return Ended("set_back", "a stop")
        if time.monotonic() - self._looked_at < _LOOK_S:
            return None
        self._looked_at = time.monotonic()
        return self._asked(self._look)

    def _look(self) -> Ended | None:
        was_known, info = self.is_known, self._find()
        if info is None and was_known:
            self._stopped.touch()
            return Ended("died", "the cluster, which does not know it any more")
        if info is None:
            arguments = ["deltaguard.service.worker", str(self._step.task_file), ALONE]
            self._executor.submit(
                self.submission_id, arguments, self._step.cache, cpus=1, gpus=self._executor.gpus
            )
            return None
        ended = _ended(info)
        if ended is not None or time.monotonic() - self._logged_at > _LOGS_S:
            self._logged_at = time.monotonic()
            self._asked(self._keep_logs)
        if ended is not None and ended.way != "done":
            _LOGGER.warning("Ray's job %s ended: %s", self.submission_id, info.message)
        return ended

    def stop(self) -> None:
        """End it, and wait until it is gone, or for a minute."""
        until = time.monotonic() + _STOP_S
        while time.monotonic() < until:
            if self._asked(self._is_gone):
                return
            time.sleep(_LOOK_S)
        _LOGGER.error("Ray's job %s may go on: end it with `ray job stop`.", self.submission_id)

    def _is_gone(self) -> bool:
        info = self._find()
        if info is None:
            return True
        self._step.folder.mkdir(parents=True, exist_ok=True)
        self._stopped.touch()
        if not info.status.is_terminal():
            self._executor.client.stop_job(self.submission_id)
            # One that waits for a place has no process; if it gets one, the stop ends it.
            return str(info.status) == "PENDING"
        self._asked(self._keep_logs)
        return True

    def leave(self) -> None:
        """Let it go on."""

    def _find(self) -> "JobDetails | None":
        info = self._executor.find(self.submission_id)
        self.is_known = info is not None
        return info

    def _keep_logs(self) -> None:
        self._log.write_text(self._executor.client.get_job_logs(self.submission_id))

    def _asked(self, ask: Callable[[], _T]) -> _T | None:
        """Ask the cluster something; None, and once a line in the log, where it does not answer."""
        try:
            return ask()
        except (OSError, RuntimeError) as error:
            # Of requests, whose errors are OSErrors, or what Ray says of any failure of its own.
            trouble = str(error)
        if trouble not in self._troubles:
            self._troubles.add(trouble)
            _LOGGER.warning("Ray, asked about %s: %s", self.submission_id, trouble)
        return None


def _ended(info: "JobDetails") -> Ended | None:
    """Say how a job of Ray ended; None while it goes on."""
    status = str(info.status)
    if not info.status.is_terminal():
        return None
    if status == "SUCCEEDED":
        return Ended("done", describe_exit(0))
    if status == "STOPPED" or info.error_type == _NO_PLACE:
        return Ended("set_back", "a stop")
    if info.driver_exit_code is not None:
        return Ended("died", describe_exit(info.driver_exit_code))
    return Ended("died", f"Ray's {info.error_type}")
