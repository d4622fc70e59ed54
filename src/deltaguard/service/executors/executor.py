"""What a step of a job needs of whatever runs its processes."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True)
class Step:
    """A step of a job, as whatever runs its processes has to know it.

    Attributes:
        kind: of its task, such as `train`.
        folder: of the job; it has the task's file, and its name is the job's id.
        cache: what is kept of aligned models for all jobs.
        key_names: environment variables that the process is given beside the usual ones.
    """

    kind: str
    folder: Path
    cache: Path
    key_names: tuple[str, ...] = ()

    @property
    def task_file(self) -> Path:
        """Name the file that tells the process what to do."""
        return self.folder / f"{self.kind}.json"


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        way: `done` by itself; `died`, which counts as a try; or `set_back`, which counts as none: it got no
            place, or somebody stopped it.
        how: in words that end a sentence, such as `exit code 1`.
    """

    way: Literal["done", "died", "set_back"]
    how: str


class Running(Protocol):
    """A process that was begun."""

    def look(self) -> Ended | None:
        """Say how it ended; None while it goes on, or nobody can tell."""
        ...

    def stop(self) -> None:
        """End it, and wait until it is gone."""
        ...

    def leave(self) -> None:
        """Watch it no more; it is ended where `begin` could not find it again."""
        ...


class Executor(Protocol):
    """Whatever runs the processes of jobs."""

    @property
    def places(self) -> int:
        """How many jobs are under way at a time, where the operator does not say."""
        ...

    def begin(self, step: Step, attempt: int) -> Running:
        """Begin a process, unless one of that step and attempt goes on: then that one is watched.

        Args:
            step: what it does.
            attempt: from 1; every further process of the step has a higher one.
        """
        ...

    def stop_leftovers(self, step: Step) -> None:
        """End what an earlier service may have left of a step that is not to go on."""
        ...


def describe_exit(code: int) -> str:
    """Say how a process ended, from its exit code.

    Example:
        >>> describe_exit(-9)
        'signal SIGKILL'
    """
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
