"""Tasks in processes of their own: begun, watched, stopped, and begun again where one died."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.durable import write_atomically
from deltaguard.service.schemas import JobError
from deltaguard.service.tasks import AnyTask, Outcome, Told, events_file

POLL_S = 0.2
"""Seconds between two looks at a process."""

_TRIES = 3
_GRACE_S = 10
_TAIL = 2000
_PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "HF_HOME"),
)


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
    task: AnyTask, folder: Path, *, cache: Path, tell: Callable[[Told], None], may_go_on: Callable[[], bool]
) -> Outcome:
    """Carry out a task in a process of its own, unless that was done before.

    A process that dies without an outcome is begun again, twice at most; it goes on with what the one before
    left in the job's folder.

    Args:
        task: what is to be done.
        folder: of the job; made if absent.
        cache: what is kept of aligned models for all jobs.
        tell: told what the process tells; what was told before a restart is told again.
        may_go_on: asked several times a second; the process is stopped when it says no.

    Raises:
        StoppedError: it said no.
    """
    outcome = folder / f"{task.kind}.outcome.json"
    follower = _Follower(folder / events_file(task.kind), tell)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{task.kind}.json", task.model_dump_json())
    code = 0
    for _ in range(_TRIES):
        if outcome.exists():
            break
        code = _run_once(task, folder, cache, follower, may_go_on)
    follower.catch_up()
    if outcome.exists():
        return read_json(outcome, Outcome, remedy="Delete it: the step is done again.")
    message = f"The process of step {task.kind} died {_TRIES} times, last with {_named(code)}."
    return Outcome(error=JobError(code="server_error", message=message))


def _run_once(
    task: AnyTask, folder: Path, cache: Path, follower: _Follower, may_go_on: Callable[[], bool]
) -> int:
    """Run a process to its end, and give its exit code."""
    command = [sys.executable, "-m", "deltaguard.service.worker", str(folder / f"{task.kind}.json")]
    keys = {name: os.environ[name] for name in task.key_names if name in os.environ}
    with (folder / f"{task.kind}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**known_environment(), **keys, "DELTAGUARD_CACHE": str(cache)},
            # Ctrl-C is for the service, which ends the process in its own way.
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            follower.catch_up()
            if not may_go_on():
                raise StoppedError("The job is not to go on.")
            time.sleep(POLL_S)
    finally:
        end_process(process)
    return process.returncode


def known_environment() -> dict[str, str]:
    """Choose what a process learns of the service's environment; whatever secrets it holds stay there."""
    known = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return known | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that reads from a pipe; one that does not end by itself is killed."""
    assert process.stdin is not None  # noqa: S101  # opened as a pipe
    process.stdin.close()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
