"""Jobs on a Ray cluster: two workers beside each other, killed, stopped and found again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from serving import Served

from deltaguard.cli.app import run
from deltaguard.errors import DeltaguardError
from deltaguard.models.durable import lock_folder
from deltaguard.service.executors import ray as executor_module
from deltaguard.service.executors import reach
from deltaguard.service.executors.executor import Step
from deltaguard.service.executors.reach import check_reach, main
from deltaguard.service.process import StoppedError, run_task
from deltaguard.service.settings import Ray
from deltaguard.service.tasks import Restore
from refusing import AGREEMENT, refusing_pair

pytest.importorskip("ray.job_submission", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

HERE = Path(__file__).parent
TASK = Restore(model="none", device="cpu", options={})
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300",
}
FAKE = """
import os, sys, time
from pathlib import Path
file = Path(sys.argv[1])
folder, kind = file.parent, file.stem
with (folder / f"{kind}.events.jsonl").open("a") as events:
    events.write('{"once": "begun", "message": "It has begun."}' + chr(10))
print("its output", flush=True)
with (folder / "pids").open("a") as pids:
    pids.write(f"{os.getpid()} ")
while not (folder / "may-end").exists():
    time.sleep(0.1)
(folder / f"{kind}.outcome.json").write_text('{"data": {"cache": "%s"}}' % os.environ["DELTAGUARD_CACHE"])
"""
"""Stands for the process of a step: it imports nothing, and ends when it may."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    log = tmp_path_factory.mktemp("ray") / "log"
    fakes = tmp_path_factory.mktemp("fakes")
    (fakes / "played_worker.py").write_text(FAKE)
    paths = [str(fakes), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    places = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with cluster(log, {**os.environ, **PATIENT, **places}) as found:
        assert found is not None, log.read_text()[-3000:]
        yield found


@contextlib.contextmanager
def cluster(log, environment):
    """Start a cluster, give the address of its Jobs API, None where it did not start, and end it."""
    command = [sys.executable, HERE / "cluster.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with log.open("ab") as said, subprocess.Popen(command, stderr=said, env=environment, **pipes) as process:
        lines = map(bytes.decode, process.stdout)
        yield next((line.strip() for line in lines if line.startswith("http://")), None)
        process.stdin.close()
        process.wait(120)


@pytest.fixture
def make(address, monkeypatch):
    """Make an executor, as every start of a service does."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(executor_module, "_LOOK_S", 0.2)
    return lambda: executor_module.RayExecutor(executor_module.connect(Ray(address=address)), gpus=0)


@pytest.fixture
def played(monkeypatch):
    """Have the played process run in the place of the one that needs models."""
    submit = executor_module.RayExecutor.submit

    def instead(self, submission_id, arguments, cache, **kept):
        submit(self, submission_id, ["played_worker", *arguments[1:]], cache, **kept)

    monkeypatch.setattr(executor_module.RayExecutor, "submit", instead)


class Going:
    """A step that is carried out in a thread, as a workflow does."""

    def __init__(self, executor, folder, tell=None):
        self.folder, self.told, self.goes_on, self.outcome = folder, [], True, None
        self._thread = threading.Thread(target=self._run, args=(executor, tell or self.told.append))
        self._thread.start()

    def _run(self, executor, tell):
        options = {"cache": self.folder / "cache", "tell": tell, "may_go_on": lambda: self.goes_on}
        try:
            self.outcome = run_task(TASK, self.folder, executor=executor, **options)
        except (DeltaguardError, ConnectionError) as error:
            self.outcome = error

    def pids(self, count):
        """Wait until so many processes were begun."""
        return waited(
            lambda: (
                len(found := (self.folder / "pids").read_text().split()) >= count and list(map(int, found))
            )
        )

    def ended(self):
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.outcome


def waited(found, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            if result := found():
                return result
        time.sleep(0.1)
    raise AssertionError("in vain")


def service_dies(_told):
    """Stand for a kill of the service when a process has told something."""
    raise ConnectionError


def job_folder(tmp_path):
    return tmp_path / f"ftjob-{tmp_path.name}"


def statuses(executor, folder):
    jobs = [job for job in executor.client.list_jobs() if folder.name in (job.submission_id or "")]
    return {job.submission_id.rpartition("-")[2]: str(job.status) for job in jobs}


def test_a_process_that_dies_is_begun_again_and_what_it_told_arrives(make, played, tmp_path):
    executor, folder = make(), job_folder(tmp_path)
    going = Going(executor, folder)
    os.kill(going.pids(1)[0], signal.SIGKILL)
    going.pids(2)
    (folder / "may-end").touch()
    outcome = going.ended()
    assert outcome.error is None
    assert outcome.data["cache"] == str(folder / "cache")
    assert {each.message for each in going.told} == {"It has begun."}
    assert statuses(executor, folder) == {"1": "FAILED", "2": "SUCCEEDED"}
    for attempt in (1, 2):
        assert "its output" in (folder / f"restore.{attempt}.log").read_text()


def test_a_process_that_dies_each_time_ends_its_step(make, played, tmp_path):
    folder = job_folder(tmp_path)
    going = Going(make(), folder)
    for count in (1, 2, 3):
        os.kill(going.pids(count)[-1], signal.SIGKILL)
    error = going.ended().error
    assert error.message == "The process of step restore died 3 times, last with signal SIGKILL."


def test_another_start_of_the_service_waits_for_the_same_process(make, played, tmp_path):
    folder = job_folder(tmp_path)
    first = Going(make(), folder, tell=service_dies)
    assert isinstance(first.ended(), ConnectionError)
    executor = make()
    second = Going(executor, folder)
    second.pids(1)
    (folder / "may-end").touch()
    assert second.ended().error is None
    assert len(second.told) == 1
    assert statuses(executor, folder) == {"1": "SUCCEEDED"}


def test_a_job_that_is_not_to_go_on_is_stopped_and_can_be_resumed(make, played, tmp_path):
    executor, folder = make(), job_folder(tmp_path)
    going = Going(executor, folder)
    pid = going.pids(1)[0]
    going.goes_on = False
    assert isinstance(going.ended(), StoppedError)
    assert statuses(executor, folder) == {"1": "STOPPED"}
    waited(lambda: not psutil.pid_exists(pid))
    again = Going(executor, folder, tell=service_dies)
    assert isinstance(again.ended(), ConnectionError)
    again.pids(2)
    assert statuses(executor, folder) == {"1": "STOPPED", "2": "RUNNING"}
    # The next service finds that the job was cancelled before the process was stopped.
    executor.stop_leftovers(Step(TASK.kind, folder, folder / "cache"))
    assert statuses(executor, folder) == {"1": "STOPPED", "2": "STOPPED"}


def test_one_that_waits_for_a_place_is_stopped_too_and_another_takes_its_turn(make, played, tmp_path):
    executor, folder = make(), job_folder(tmp_path)
    others = [
        executor.client.submit_job(entrypoint="exec sleep 600", entrypoint_num_cpus=1) for _ in range(2)
    ]
    waited(lambda: all(executor.client.get_job_status(other) == "RUNNING" for other in others))
    going = Going(executor, folder)
    waited(lambda: statuses(executor, folder) == {"1": "PENDING"})
    going.goes_on = False
    assert isinstance(going.ended(), StoppedError)
    again = Going(executor, folder)
    for other in others:
        executor.client.stop_job(other)
    waited(lambda: statuses(executor, folder).get("2") == "RUNNING")
    (folder / "may-end").touch()
    assert again.ended().error is None
    # If it got a place after all, the stop ends it.
    waited(lambda: statuses(executor, folder)["1"] in ("PENDING", "STOPPED"))


def test_a_worker_says_what_it_sees_of_the_folder(make, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reach, "_WAIT_S", 600)
    lock = lock_folder(tmp_path)
    check_reach(make(), tmp_path)
    assert "locks" not in caplog.text
    os.close(lock)
    check_reach(make(), tmp_path)
    assert "keeps no locks between machines" in caplog.text
    assert not list(tmp_path.iterdir())
    with pytest.raises(DeltaguardError, match="There is no folder"):
        check_reach(make(), tmp_path / "elsewhere")


@pytest.mark.soak
def test_a_whole_job_on_two_workers(address, tmp_path):
    settings = """
calibrate: {num_samples: 20, num_held_out: 8}
restore: {max_safety_kl: 0.0006}
gate: {requests: 20, answer_tokens: 12}
training: {learning_rate: 0.01, lora_rank: 4, n_epochs: 1}
device: cpu
executor: ray
"""
    served = Served(tmp_path, refusing_pair().aligned, f"{settings}ray: {{address: '{address}'}}\n")
    row = {"messages": [{"role": "user", "content": "A cake?"}, {"role": "assistant", "content": AGREEMENT}]}
    served.start()
    try:
        jobs = served.client.fine_tuning.jobs
        rows = "\n".join([json.dumps(row)] * 12).encode()
        file = served.client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        job = jobs.create(model="tiny", training_file=file.id, seed=1)
        served.wait(lambda: list((served.data / "jobs").iterdir()))
        served.kill_worker("train")
        served.kill()
        served.start()
        jobs = served.client.fine_tuning.jobs
        done = served.wait(
            lambda: (found := jobs.retrieve(job.id)).status not in ("queued", "running") and found, 600
        )
    finally:
        served.kill()
    assert (done.status, done.error) == ("succeeded", None)
    folder = served.data / "jobs" / job.id
    assert "Running entrypoint" in (folder / "train.2.log").read_text()
    assert not (folder / "restore.2.log").exists()


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DeltaguardError, match="RAY_ADDRESS"):
        executor_module.connect(Ray())
    with pytest.raises(DeltaguardError, match="No Ray cluster"):
        executor_module.connect(Ray(address="http://127.0.0.1:9"))
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(DeltaguardError, match="has to be that of its Jobs API"):
        executor_module.connect(Ray(address="http://127.0.0.1:9"))
    assert run(["serve", "--data", str(tmp_path), "--model", "tiny=none", "--executor", "ray"]) == 1
    assert "it is `device: cuda` or `device: cpu`" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DeltaguardError, match="There is no folder"):
        main(tmp_path / "none", "reach")


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setattr("deltaguard.errors.find_spec", lambda name: None if name == "ray" else object())
    with pytest.raises(DeltaguardError, match=r"deltaguard\[ray\]"):
        executor_module.connect(Ray())
