"""Tasks in processes of their own: begun, watched, stopped, and begun again where one died."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json, read_text
from deltaguard.models.durable import write_atomically
from deltaguard.service.executors.executor import Ended, Executor, Running, Step
from deltaguard.service.schemas import JobError
from deltaguard.service.tasks import AnyTask, Outcome, Told, Train, events_file

POLL_S = 0.2
"""Seconds between two looks at a process."""

_TRIES = 3
_FIRST_WAIT_S, _LONGEST_WAIT_S = 30, 900
_LONGEST_AWAY_S = 86_400
"""A step whose server is away waits as long again as it has waited, within these bounds, and no longer."""
_SEEN_WITHIN_S = 60
"""Storage that machines share may show a file so much later than its process ended."""

_AWAY = "A server that this step asks does not answer; the step waits, and goes on by itself."
_LOGGER = logging.getLogger(__name__)


class StoppedError(DeltaguardError):
    """A task was stopped because its job is not to go on."""


@dataclass
class _Follower:
    """Reads a file of lines while another process appends to it.

    Attributes:
        path: of the file; it may not be there yet.
        tell: told each line, once.
        at: bytes read so far.
    """

    path: Path
    tell: Callable[[Told], None]
    at: int = 0

    def catch_up(self) -> None:
        """Tell the whole lines that have come since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            self.tell(Told.model_validate_json(line))


def run_task(
    task: AnyTask,
    folder: Path,
    *,
    executor: Executor,
    cache: Path,
    tell: Callable[[Told], None],
    may_go_on: Callable[[], bool],
) -> Outcome:
    """Carry out a task in a process of its own, unless that was done before.

    A process that dies without an outcome is begun again, twice at most; it goes on with what the one before
    left in the job's folder. One that ends because a server is away, such as a judge's, is begun again later,
    for a day, and anew where the service or the job was stopped meanwhile.

    Args:
        task: what is to be done.
        folder: of the job; made if absent.
        executor: runs the process.
        cache: what is kept of aligned models for all jobs.
        tell: told what the process tells; what was told before a restart is told again.
        may_go_on: asked several times a second; the process is stopped when it says no.

    Raises:
        StoppedError: it said no.
    """
    outcome = folder / f"{task.kind}.outcome.json"
    follower = _Follower(folder / events_file(task.kind), tell)
    folder.mkdir(parents=True, exist_ok=True)
    step = Step(task.kind, folder, cache, task.key_names)
    begun = step.task_file.exists() and not outcome.exists()
    if begun and not isinstance(task, Train) and read_text(step.task_file) != task.model_dump_json():
        # What goes on elsewhere, such as on a cluster, does so as the settings were when it began.
        executor.stop_leftovers(step)
    if outcome.exists() and _outcome_of(outcome).is_away:
        _forget(step, outcome, executor)
    write_atomically(step.task_file, task.model_dump_json())
    attempts, since = count(1), None
    while True:
        found = _tried(
            task.kind, outcome, lambda: _watched(executor.begin(step, next(attempts)), follower, may_go_on)
        )
        follower.catch_up()
        since = since or time.time()
        waited = time.time() - since
        if not found.is_away or waited > _LONGEST_AWAY_S:
            return found
        wait = min(max(waited, _FIRST_WAIT_S), _LONGEST_WAIT_S)
        _LOGGER.warning(
            "Step %s of %s begins again in %.0f s: %s", task.kind, folder.name, wait, found.reason
        )
        tell(Told(once=f"{task.kind} waits since {since:.0f}", message=_AWAY, level="warn"))
        _pause(wait, may_go_on)
        _forget(step, outcome, executor)


def _outcome_of(file: Path) -> Outcome:
    return read_json(file, Outcome, remedy="Delete it: the step is done again.")


def _forget(step: Step, outcome: Path, executor: Executor) -> None:
    """Have a step done again that has an outcome."""
    # A cluster knows its processes by their attempts: none that has ended is to be found as the next one.
    executor.stop_leftovers(step)
    outcome.unlink(missing_ok=True)


def _tried(kind: str, outcome: Path, watched: Callable[[], Ended]) -> Outcome:
    """Have processes begun and watched until one leaves an outcome, or too many have died."""
    deaths: list[str] = []
    while not outcome.exists():
        if len(deaths) == _TRIES:
            message = f"The process of step {kind} died {_TRIES} times, last with {deaths[-1]}."
            return Outcome(error=JobError(code="server_error", message=message))
        ended = watched()
        if ended.way == "died" or (ended.way == "done" and not _appears(outcome)):
            deaths.append(ended.how)
    return _outcome_of(outcome)


def _pause(seconds: float, may_go_on: Callable[[], bool]) -> None:
    """Wait, as long as the job is to go on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not may_go_on():
            raise StoppedError("The job is not to go on.")
        time.sleep(POLL_S)


def _watched(running: Running, follower: _Follower, may_go_on: Callable[[], bool]) -> Ended:
    """Watch a process to its end."""
    try:
        while may_go_on():
            if (ended := running.look()) is not None:
                return ended
            follower.catch_up()
            time.sleep(POLL_S)
        running.stop()
    finally:
        running.leave()
    raise StoppedError("The job is not to go on.")


def _appears(file: Path) -> bool:
    """Wait for a file that was written, and say whether it can be seen here."""
    until = time.monotonic() + _SEEN_WITHIN_S
    while not file.exists() and time.monotonic() < until:
        time.sleep(POLL_S)
    return file.exists()
