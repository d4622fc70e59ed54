"""The process that carries out one task of a job: `python -m deltaguard.service.worker TASK.json`.

It ends with the service that began it: its standard input is a pipe that closes when the service dies,
whatever killed it. With `--alone` it does not: a cluster runs it. It holds a lock on the job's folder, so
that one begun later waits until it is gone.
"""

import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from deltaguard.errors import DeltaguardError
from deltaguard.files import append_journal, read_json, read_text
from deltaguard.models.durable import explained, write_atomically
from deltaguard.service.schemas import JobError
from deltaguard.service.tasks import (
    ANY_TASK,
    OPERATORS_BUSINESS,
    AnyTask,
    Calibrate,
    Moderate,
    Outcome,
    Restore,
    Told,
    Train,
    events_file,
)

PARENT_GONE = 75
"""Exit code of a process whose service is gone."""

ALONE = "--alone"
"""Says that the process goes on without the service."""

Tell = Callable[[Told], None]


def main(task_file: Path, *, is_alone: bool) -> None:
    """Carry out a task, and write what came of it beside its file.

    Args:
        task_file: `KIND.json` in the job's folder; `KIND.events.jsonl` receives what is told, and
            `KIND.outcome.json`, last, the outcome.
        is_alone: whether it goes on without the service.
    """
    if not is_alone:
        end_with_parent()
    task = read_json(task_file, ANY_TASK, remedy="The service writes it.")
    folder = task_file.parent
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    events = folder / events_file(task.kind)
    _drop_half_line(events)

    def tell(told: Told) -> None:
        append_journal(events, told.model_dump_json())

    try:
        outcome = _perform(take_up(task, folder), folder, tell)
    except DeltaguardError as error:
        outcome = _failed(task, error)
    write_atomically(folder / f"{task.kind}.outcome.json", outcome.model_dump_json())


def take_up(task: AnyTask, folder: Path) -> AnyTask:
    """Say how a task goes on that an earlier process began: a training as it was, others as they are set now.

    What a restore or the gate left of another task, or of another release, is of no use and removed. The
    job's folder is locked, so that no other process works in it.

    Args:
        task: what is to be done.
        folder: of the job; it receives `KIND.begun.json`.
    """
    file = folder / f"{task.kind}.begun.json"
    if file.exists():
        if isinstance(task, Train):
            begun = read_json(file, Train, remedy="Delete it: the training begins as it is set now.")
            places = ("model", "device", "training_file", "validation_file")
            task = begun.model_copy(update={name: getattr(task, name) for name in places})
        elif read_text(file) != task.model_dump_json():
            for left in (folder / name for name in task.half_done):
                if left.exists():
                    with explained(left):
                        shutil.rmtree(left)
    write_atomically(file, task.model_dump_json())
    return task


def end_with_parent() -> None:
    """End this process when whoever holds the other end of its standard input is gone."""

    def wait() -> None:
        # Not `sys.stdin`, whose lock a thread may not hold when the interpreter ends.
        while os.read(0, 1):
            pass
        os._exit(PARENT_GONE)

    threading.Thread(target=wait, daemon=True).start()


def _perform(task: AnyTask, folder: Path, tell: Tell) -> Outcome:
    # Each imports what it needs alone: torch takes seconds.
    if isinstance(task, Calibrate):
        from deltaguard.service.steps.calibrate import calibrate_model

        return calibrate_model(task, tell)
    if isinstance(task, Train):
        from deltaguard.service.steps.train import train_model

        return train_model(task, folder, tell)
    if isinstance(task, Restore):
        from deltaguard.service.steps.restore import restore_model

        return restore_model(task, folder, tell)
    if isinstance(task, Moderate):
        from deltaguard.service.steps.moderate import moderate_rows

        return moderate_rows(task, folder, tell)
    from deltaguard.service.steps.examine import examine_models

    return examine_models(task, folder, tell)


def _failed(task: AnyTask, error: DeltaguardError) -> Outcome:
    """Say of an error what is the customer's business; of any other, which names places, the operator's."""
    from deltaguard.evaluation.exchange import ServerAwayError
    from deltaguard.finetuning.training import UntrainableError
    from deltaguard.restoration.restore import UnchangedError
    from deltaguard.service.training_data import InvalidFileError

    code = f"{task.kind}_failed"
    if isinstance(error, InvalidFileError):
        said = JobError(code="invalid_training_file", message=str(error), param="training_file")
        return Outcome(error=said)
    if isinstance(error, UntrainableError):
        return Outcome(error=JobError(code=code, message=str(error)))
    if isinstance(error, UnchangedError):
        message = "The training changed no weight. Raise n_epochs or learning_rate_multiplier."
        return Outcome(error=JobError(code="train_failed", message=message))
    said = JobError(code=code, message=OPERATORS_BUSINESS)
    return Outcome(error=said, reason=str(error), is_away=isinstance(error, ServerAwayError))


def _drop_half_line(events: Path) -> None:
    """Remove a last line that a kill cut short, so that the next one begins where it should."""
    if events.exists():
        content = events.read_bytes()
        os.truncate(events, content.rfind(b"\n") + 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), is_alone=sys.argv[2:] == [ALONE])
