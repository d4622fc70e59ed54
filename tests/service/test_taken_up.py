"""A step that was begun goes on, whatever became of the settings, or the release, since then."""

import pytest

from deltaguard import CurvatureStore, DeltaguardError
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import identify
from deltaguard.restoration.job import default_store_folder
from deltaguard.service.process import StoppedError, run_task
from deltaguard.service.settings import Gate, Limits
from deltaguard.service.steps.calibrate import calibrate_model
from deltaguard.service.steps.restore import restore_model
from deltaguard.service.tasks import (
    CHECKPOINTS,
    EXAMINED,
    FINETUNED,
    RESTORED,
    Calibrate,
    Examine,
    Outcome,
    Restore,
    Train,
)
from deltaguard.service.worker import take_up
from pairs import pair

RESTORE = Restore(model="m", device="cpu", options={"max_safety_kl": 0.0006})
EXAMINE = Examine(model="m", device="cpu", gate=Gate(requests=20))


@pytest.mark.parametrize(
    ("task", "name", "changed"),
    [
        (RESTORE, RESTORED, {"options": {"max_safety_kl": 0.001}}),
        (RESTORE, RESTORED, {"release": "0.0.1"}),
        (EXAMINE, EXAMINED, {"gate": Gate(requests=10)}),
    ],
)
def test_what_was_left_serves_the_same_task_of_the_same_release_alone(task, name, changed, tmp_path):
    assert take_up(task, tmp_path) == task
    (tmp_path / name / "half").mkdir(parents=True)
    assert take_up(task, tmp_path) == task
    assert (tmp_path / name).exists()
    other = task.model_copy(update=changed)
    assert take_up(other, tmp_path) == other
    assert not (tmp_path / name).exists()
    (tmp_path / name).mkdir()
    assert take_up(other, tmp_path) == other
    assert (tmp_path / name).exists()


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
    assert take_up(task, tmp_path) == task
    (tmp_path / CHECKPOINTS).mkdir()
    places = {"model": "elsewhere", "device": "cuda", "training_file": tmp_path / "b"}
    changed = task.model_copy(update={"learning_rate": 1.0, "lora_rank": 4, **places})
    for _ in range(2):
        assert take_up(changed, tmp_path) == task.model_copy(update=places)
    assert (tmp_path / CHECKPOINTS).exists()


def test_a_calibration_that_was_begun_otherwise_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path))
    aligned = pair().aligned
    few = {"num_samples": 8, "num_look_alikes": 8, "num_held_out": 4, "max_new_tokens": 2}
    folder = default_store_folder(identify(Checkpoint.open(aligned)), "auto")

    def kill(event):
        if event.stage == "accumulate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(aligned, folder, config=CalibrateConfig(device="cpu", **few), progress=kill)
    options = few | {"num_samples": 10}
    task = Calibrate(model=str(aligned), device="cpu", options=options, restore={"memory": "8GB"})
    assert calibrate_model(task, lambda _: None) == Outcome()
    assert CurvatureStore.from_pretrained(folder).provenance.conversations == 10 + 8


def test_a_store_that_is_finished_meanwhile_stays_though_the_cache_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    aligned, make = pair().aligned, calibrate
    few = {"num_samples": 8, "num_look_alikes": 8, "num_held_out": 4, "max_new_tokens": 2}

    calls = []

    def slower(model, folder, *, config):
        """Another process, which asks for something else, is the first to finish."""
        calls.append(folder)
        assert len(calls) == 1, "the other's store was removed"
        make(model, folder, config=CalibrateConfig(device="cpu", **few))
        return make(model, folder, config=config)

    monkeypatch.setattr("deltaguard.service.steps.calibrate.calibrate", slower)
    options = few | {"num_samples": 10}
    task = Calibrate(model=str(aligned), device="cpu", options=options, restore={"memory": "8GB"})
    assert calibrate_model(task, lambda _: None) == Outcome()
    folder = default_store_folder(identify(Checkpoint.open(aligned)), "auto")
    assert CurvatureStore.from_pretrained(folder).provenance.conversations == 8 + 8


def test_an_adapter_is_restored_to_the_rank_it_was_trained_with_whatever_the_setting_is_now(
    tmp_path, monkeypatch
):
    (tmp_path / FINETUNED).mkdir()
    (tmp_path / FINETUNED / "adapter_config.json").write_text('{"r": 64, "peft_type": "LORA"}')
    chosen = []

    def restored(*_, config, **__):
        chosen.append(config)
        raise DeltaguardError("far enough")

    monkeypatch.setattr("deltaguard.service.steps.restore.restore", restored)
    with pytest.raises(DeltaguardError, match="far enough"):
        restore_model(RESTORE, tmp_path, lambda _: None)
    assert (chosen[0].output_format, chosen[0].adapter_rank) == ("adapter", 64)


class Elsewhere:
    """Runs processes that outlive the service."""

    places = 1

    def __init__(self):
        self.stopped = []

    def begin(self, step, attempt):
        return self

    def look(self):
        return None

    def stop(self):
        pass

    def leave(self):
        pass

    def stop_leftovers(self, step):
        self.stopped.append(step.kind)


def test_what_goes_on_elsewhere_is_stopped_where_its_task_is_another_now(tmp_path):
    executor = Elsewhere()
    options = {"executor": executor, "cache": tmp_path, "tell": None, "may_go_on": lambda: False}
    for gate, stopped in ((EXAMINE.gate, 0), (EXAMINE.gate, 0), (Gate(requests=10), 1)):
        with pytest.raises(StoppedError):
            run_task(EXAMINE.model_copy(update={"gate": gate}), tmp_path, **options)
        assert len(executor.stopped) == stopped
