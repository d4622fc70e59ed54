"""Whether workers of a cluster see what the service sees: one of them is asked when the service starts.

What it finds is a file in the data folder: `python -m deltaguard.service.executors.reach FOLDER NAME` on the
worker. It says something of one worker, the one that was free, and nothing of others.
"""

import logging
import os
import sys
import time
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from pydantic import BaseModel

from deltaguard import __version__
from deltaguard.errors import DeltaguardError
from deltaguard.models.durable import InUseError, explained, lock_folder, write_atomically

if TYPE_CHECKING:
    from deltaguard.service.executors.ray import RayExecutor

_WAIT_S = 60
_LOOK_S = 0.5
_TAIL = 1500
_SHARE = 0.01
"""Of a processor: enough that Ray puts the question on a machine that takes jobs, however busy."""

_LOGGER = logging.getLogger(__name__)


class Reach(BaseModel):
    """What a worker found.

    Attributes:
        version: of its deltaguard.
        sees_locks: whether it met the lock that the service holds on the data folder.
    """

    version: str
    sees_locks: bool


def main(folder: Path, name: str) -> None:
    """Write down what this worker sees of a data folder that a service holds.

    Raises:
        DeltaguardError: the folder is not there, or cannot be written.
    """
    if not folder.is_dir():
        raise DeltaguardError(f"There is no folder {folder} on this machine: workers share the data folder.")
    try:
        os.close(lock_folder(folder))
        sees_locks = False
    except InUseError:
        sees_locks = True
    with explained(folder):
        found = Reach(version=__version__, sees_locks=sees_locks)
        write_atomically(folder / name, found.model_dump_json())


def check_reach(executor: "RayExecutor", data: Path) -> None:
    """Have one worker look at the data folder.

    Where none is free within a minute, that is logged and no more: jobs wait for one likewise.

    Args:
        executor: whose workers.
        data: the folder, which the service has locked.

    Raises:
        DeltaguardError: the worker does not see the folder, or has another deltaguard.
    """
    name = f"reach-{token_hex(8)}"
    file, submission_id = data / name, f"deltaguard-{name}"
    arguments = ["deltaguard.service.executors.reach", str(data), name]
    until, is_submitted = time.monotonic() + _WAIT_S, False
    try:
        while time.monotonic() < until:
            if not is_submitted:
                is_submitted = _submitted(executor, submission_id, arguments, data)
            elif file.exists():
                return _judge(Reach.model_validate_json(file.read_bytes()), data)
            elif _has_failed(executor, submission_id):
                said = executor.client.get_job_logs(submission_id)[-_TAIL:]
                raise DeltaguardError(f"A worker of Ray could not look at {data}; it said:\n{said}")
            time.sleep(_LOOK_S)
        info = executor.find(submission_id)
        if info is not None and str(info.status) == "SUCCEEDED":
            raise DeltaguardError(
                f"A worker of Ray wrote into {data}, and it is not to be seen here: that folder has to be on "
                "storage that the service and all workers share, under the same path."
            )
        _LOGGER.warning("No worker of the Ray cluster was free within a minute: none was asked what it sees.")
        if info is not None:
            executor.client.stop_job(submission_id)
    finally:
        file.unlink(missing_ok=True)


def _submitted(executor: "RayExecutor", submission_id: str, arguments: list[str], data: Path) -> bool:
    try:
        executor.submit(submission_id, arguments, data / "cache", cpus=_SHARE, gpus=0)
    except (OSError, RuntimeError) as error:
        # A cluster that has just started takes no jobs for some seconds.
        _LOGGER.warning("The Ray cluster does not take a job yet: %s", error)
        return executor.find(submission_id) is not None
    return True


def _has_failed(executor: "RayExecutor", submission_id: str) -> bool:
    info = executor.find(submission_id)
    return info is not None and str(info.status) in ("FAILED", "STOPPED")


def _judge(found: Reach, data: Path) -> None:
    if found.version != __version__:
        raise DeltaguardError(
            f"A worker of Ray has deltaguard {found.version}, the service {__version__}: install the same."
        )
    if not found.sees_locks:
        _LOGGER.warning(
            "The storage of %s keeps no locks between machines: of two processes of one job, such as after a "
            "machine that was cut off came back, both would work.",
            data,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
