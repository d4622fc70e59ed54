"""kill -9 at random moments of the service and of the processes of its jobs, over a queue of tiny jobs."""

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import openai
from sqlalchemy import func, select
from tools.service_results import Kills

from benchmarks.service.ledger import Ledger
from benchmarks.service.rows import rows_of
from benchmarks.service.serving import MODEL, NotServingError, Serving, Worker, waited_for
from deltaguard.device import device_name
from deltaguard.reports.records.base import environment
from deltaguard.service.server import existing_service
from deltaguard.service.tables import UNFINISHED, Job

SETTINGS = """\
jobs_at_once: 2
calibrate: {num_samples: 20, num_held_out: 8}
# Nearly all is kept, so that the gate has models to block: those of rows that agree to everything.
restore: {strength: 0.9}
gate: {requests: 20, answer_tokens: 12}
training: {learning_rate: 0.01, lora_rank: 4}
limits: {unfinished_jobs: 1000}
"""

Target = Literal["server", "trainer", "worker"]
TARGETS: tuple[Target, ...] = ("server", "trainer", "worker")

_SPREAD_S = 10
"""A kill comes at a random moment of so many seconds after its turn has come."""

_STEP_S = 6
"""The process of a step is killed within so many seconds after it was found."""

_PAUSE_S = 2
"""Jobs are sent so many seconds apart at most, so that some are sent while the service is killed."""

_RECORDED_S = 60
"""So long after its last step a workflow may be noted as done."""

_JOB_S = 240
"""So long a job may take in the mean, kills and starts of the service included."""

_MOST_WAIT_S = 3 * _JOB_S
"""So long the next job may let wait for its end, or the next process for its beginning."""


class _Sender(threading.Thread):
    """A customer who sends jobs, by the stock client, which tries again by itself.

    Attributes:
        sent: what rows each job has, by its id.
        error: why a job could not be sent.
    """

    def __init__(self, serving: Serving, jobs: int, chosen: random.Random) -> None:
        super().__init__(daemon=True)
        self.sent: dict[str, str] = {}
        self.error: openai.OpenAIError | None = None
        self._jobs, self._chosen = jobs, chosen
        self._client = openai.OpenAI(api_key=serving.key, base_url=f"{serving.url}/v1", max_retries=60)

    def run(self) -> None:
        """Send all jobs."""
        try:
            for number in range(self._jobs):
                kind, rows = rows_of(number)
                file = self._client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
                job = self._client.fine_tuning.jobs.create(
                    model=MODEL, training_file=file.id, suffix=f"{kind}-{number}", seed=number
                )
                self.sent[job.id] = kind
                time.sleep(self._chosen.uniform(0, _PAUSE_S))
        except openai.OpenAIError as error:
            self.error = error


class _Disturber:
    """Kills one process after another, each at a random moment, and starts the service again.

    Attributes:
        killed: kills so far, by what was killed.
        interrupted: processes of steps that ended with a kill, by the kind of step.
    """

    def __init__(self, serving: Serving, jobs: int, kills: int, chosen: random.Random) -> None:
        self.killed: Counter[str] = Counter()
        self.interrupted: Counter[str] = Counter()
        self._serving, self._jobs, self._kills, self._chosen = serving, jobs, kills, chosen
        self._sessions = existing_service(serving.data).sessions

    def run(self) -> None:
        """Spread all kills over the queue: the next one comes when its share of the jobs has ended."""
        for number in range(self._kills):
            due = number * max(0, self._jobs - 2) // self._kills
            if not waited_for(lambda due=due: self.ended() >= due, _MOST_WAIT_S):
                return
            time.sleep(self._chosen.uniform(0, _SPREAD_S))
            self._kill(self._chosen.choice(TARGETS))

    def ended(self) -> int:
        """Count the jobs that have ended.

        Raises:
            NotServingError: the service ended by itself.
        """
        if not self._serving.is_running:
            raise NotServingError(f"The service ended by itself; {self._serving.log} says more.")
        with self._sessions.begin() as session:
            query = select(func.count()).select_from(Job).where(Job.status.not_in(UNFINISHED))
            return session.scalar(query) or 0

    def _kill(self, target: Target) -> None:
        if target == "server":
            self.interrupted.update(worker.kind for worker in self._serving.workers())
            self._serving.kill()
            self._serving.start()
        elif not self._kill_worker(target):
            return
        self.killed[target] += 1

    def _kill_worker(self, target: Target) -> bool:
        """Kill the process of a step, and say whether there was one before all jobs had ended."""
        until = time.monotonic() + _MOST_WAIT_S
        while self.ended() < self._jobs and time.monotonic() < until:
            if self._workers(target):
                time.sleep(self._chosen.uniform(0, _STEP_S))
                if found := self._workers(target):
                    worker = self._chosen.choice(found)
                    try:
                        os.killpg(worker.pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue  # It ended just now.
                    self.interrupted[worker.kind] += 1
                    return True
            time.sleep(0.1)
        return False

    def _workers(self, target: Target) -> list[Worker]:
        return [each for each in self._serving.workers() if (each.kind == "train") == (target == "trainer")]


def measure_kills(folder: Path, *, jobs: int, kills: int, seed: int) -> Kills:
    """Kill the service and the processes of its jobs until all jobs have ended, and look at what is left.

    Args:
        folder: a new folder.
        jobs: that are sent.
        kills: at random moments.
        seed: of the moments and of what is killed.

    Raises:
        NotServingError: the service does not start, or ends by itself.
    """
    serving, started = Serving(folder, SETTINGS), time.monotonic()
    serving.start()
    try:
        serving.wait_until_ready()
        sender = _Sender(serving, jobs, random.Random(f"{seed} sender"))
        disturber = _Disturber(serving, jobs, kills, random.Random(f"{seed} kills"))
        sender.start()
        faults = _disturbed(serving, disturber, sender, jobs)
        seconds = time.monotonic() - started
        serving.wait_until_ready()
        ledger = Ledger(serving, sender.sent)
        answered = ledger.ask_models()
        waited_for(lambda: not ledger.unrecorded(), _RECORDED_S)
    finally:
        serving.stop()
    made = sum(disturber.killed.values())
    broken = {
        "every job was taken": () if sender.error is None else (str(sender.error),),
        "the service never ended by itself": faults,
        "all kills came before the queue ended": () if made == kills else (f"{made} of {kills}",),
        **ledger.broken(jobs),
    }
    return Kills(
        environment=environment(device_name(), libraries=("openai", "fastapi", "dbos", "trl")),
        seed=seed,
        jobs=len(sender.sent),
        kills={target: disturber.killed[target] for target in TARGETS},
        interrupted=dict(disturber.interrupted),
        ended=ledger.ended(),
        published=ledger.published(),
        answered=answered,
        job_seconds=statistics.median(ledger.job_seconds() or [0.0]),
        seconds=seconds,
        broken=broken,
    )


def _disturbed(serving: Serving, disturber: _Disturber, sender: _Sender, jobs: int) -> tuple[str, ...]:
    """Disturb a service until all jobs have ended, and say why it ended by itself, if it did."""
    try:
        disturber.run()
        sender.join(_JOB_S * jobs)
        waited_for(lambda: disturber.ended() >= jobs, _JOB_S * jobs)
    except NotServingError as error:
        # So that there are books to look into.
        serving.start()
        return (str(error),)
    return ()
