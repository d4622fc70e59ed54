"""A step that was begun goes on, whatever became of the settings, or the release, since then."""

import json

import pytest

from deltaguard.service.process import StoppedError, run_task
from deltaguard.service.settings import Gate, Limits
from deltaguard.service.tasks import EXAMINED, RESTORED, Examine, Outcome, Restore, Train

RESTORE = Restore(model="m", device="cpu", options={"max_safety_kl": 0.0006})
EXAMINE = Examine(model="m", device="cpu", gate=Gate(requests=20))


class Played:
    """Runs nothing: each process leaves something half-done, and ends the step where it is to."""

    places = 1

    def __init__(self, name, *, ends):
        self.name, self.ends, self.found, self.stopped = name, ends, [], 0

    def begin(self, step, attempt):
        left = step.folder / self.name
        self.found.append((json.loads(step.task_file.read_text()), left.exists()))
        left.mkdir(exist_ok=True)
        if self.ends:
            (step.folder / f"{step.kind}.outcome.json").write_text(Outcome().model_dump_json())
        return self

    def look(self):
        return None

    def stop(self):
        pass

    def leave(self):
        pass

    def stop_leftovers(self, step):
        self.stopped += 1


def run(task, folder, name, *, ends=False):
    """Carry a task out, or be interrupted in it; gives what the process found, and the executor."""
    executor = Played(name, ends=ends)
    options = {"executor": executor, "cache": folder, "tell": None, "may_go_on": lambda: False}
    with pytest.raises(StoppedError):
        run_task(task, folder, **options)
    return *executor.found[0], executor


@pytest.mark.parametrize(
    ("task", "name", "changed"),
    [
        (RESTORE, RESTORED, {"options": {"max_safety_kl": 0.001}}),
        (RESTORE, RESTORED, {"release": "0.0.1"}),
        (EXAMINE, EXAMINED, {"gate": Gate(requests=10)}),
    ],
)
def test_what_was_left_serves_the_same_task_of_the_same_release_alone(task, name, changed, tmp_path):
    run(task, tmp_path, name)
    _, was_there, executor = run(task, tmp_path, name)
    assert was_there
    assert executor.stopped == 0
    other = task.model_copy(update=changed)
    told, was_there, executor = run(other, tmp_path, name)
    assert not was_there
    assert executor.stopped == 1
    assert told == json.loads(other.model_dump_json())


def test_a_training_goes_on_as_it_began_where_its_files_lie_now(tmp_path):
    how = {
        "method": "supervised",
        "validation_file": None,
        "limits": Limits(),
        "epochs": 1,
        "batch_size": 2,
        "max_length": 64,
        "seed": 0,
        "lora_rank": 8,
        "lora_alpha": 16,
        "beta": 0.1,
    }
    task = Train(model="m", device="cpu", training_file=tmp_path / "a", learning_rate=1e-4, **how)
    run(task, tmp_path, "checkpoints")
    places = {"model": "elsewhere", "device": "cuda", "training_file": tmp_path / "b"}
    told, was_there, _ = run(
        task.model_copy(update={"learning_rate": 1.0, **places}), tmp_path, "checkpoints"
    )
    assert was_there
    assert told == json.loads(task.model_copy(update=places).model_dump_json())


def test_a_step_that_is_done_is_left_as_it_is(tmp_path):
    run(RESTORE, tmp_path, RESTORED, ends=True)
    other = RESTORE.model_copy(update={"options": {}})
    executor = Played(RESTORED, ends=True)
    options = {"executor": executor, "cache": tmp_path, "tell": None, "may_go_on": lambda: False}
    assert run_task(other, tmp_path, **options) == Outcome()
    assert executor.found == []
    assert (tmp_path / RESTORED).exists()
