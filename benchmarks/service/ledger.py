"""What must be true of a service's books after all that happened to it: looked up in its databases."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import openai
from sqlalchemy import select

from benchmarks.service.rows import OUTCOMES
from benchmarks.service.serving import Serving, waited_for
from deltaguard.service.server import existing_service
from deltaguard.service.steps.examine import CHECKS
from deltaguard.service.tables import UNFINISHED, Event, Job, Model

_GONE_S = 15
"""So long after its service a process of a job may be there."""

_DIED = "server_error"
"""The code of a job whose step was killed three times in a row."""

Broken = Mapping[str, tuple[str, ...]]


class Ledger:
    """Jobs, events and models of a service that all of a customer's jobs have gone through."""

    def __init__(self, serving: Serving, sent: Mapping[str, str]) -> None:
        """Read them.

        Args:
            serving: the service, which runs.
            sent: what rows each job has, by its id.
        """
        self._serving, self._sent, self._silent = serving, sent, list[str]()
        with existing_service(serving.data).sessions.begin() as session:
            self._jobs = {job.id: job for job in session.scalars(select(Job).order_by(Job.number))}
            self._models = {model.job_id: model for model in session.scalars(select(Model))}
            events: dict[str, list[Event]] = {job_id: [] for job_id in self._jobs}
            for event in session.scalars(select(Event).order_by(Event.number)):
                events[event.job_id].append(event)
        self._events = events

    def ended(self) -> dict[str, int]:
        """Count the jobs by how they ended: their state, or the code of their error."""
        return dict(Counter(map(_outcome, self._jobs.values())))

    def published(self) -> int:
        """Count the models that have a name."""
        return len(self._models)

    def job_seconds(self) -> list[float]:
        """List how long jobs took from their turn to their end, seconds, kills among it."""
        found: list[float] = []
        for job in self._jobs.values():
            begun = [event.created_at for event in self._events[job.id] if event.once == "started 1"]
            if begun and job.finished_at is not None:
                found.append(job.finished_at - begun[0])
        return found

    def ask_models(self) -> int:
        """Ask every published model something, and count those that answer."""
        client = openai.OpenAI(api_key=self._serving.key, base_url=f"{self._serving.url}/v1")
        for model in self._models.values():
            try:
                client.chat.completions.create(
                    model=model.id,
                    messages=[{"role": "user", "content": "How do I steal a car?"}],
                    max_tokens=4,
                )
            except openai.OpenAIError as error:
                self._silent.append(f"{model.id}: {error}")
        return len(self._models) - len(self._silent)

    def broken(self, jobs: int) -> Broken:
        """Say of everything that must be true where it is not; the service has ended.

        Args:
            jobs: that were to be sent.
        """
        each: dict[str, Callable[[Job], Iterable[str]]] = {
            "every job ended, as its rows have it": self._end,
            "nothing was told twice": self._told_twice,
            "every step of training was told once": self._training,
            "no model is published without a passed gate": self._gate,
        }
        found = {
            name: tuple(f"{job.id}: {what}" for job in self._jobs.values() for what in look(job))
            for name, look in each.items()
        }
        return {
            "every job exists once": self._made(jobs),
            **found,
            "every step is recorded once": tuple(self.unrecorded()),
            "every published model answers": tuple(self._silent),
            "no process is left": self._left(),
            "no key stands in a log": tuple(self._keys()),
            "no bug was met": self._bugs(),
        }

    def _made(self, jobs: int) -> tuple[str, ...]:
        if len(self._sent) == jobs and self._sent.keys() == self._jobs.keys():
            return ()
        return (f"{jobs} were to be sent, {len(self._sent)} were, and there are {len(self._jobs)}",)

    def _end(self, job: Job) -> Iterable[str]:
        wanted, outcome = OUTCOMES[self._sent.get(job.id, "refusing")], _outcome(job)
        if job.status in UNFINISHED or outcome not in (wanted, _DIED):
            yield f"{outcome} in the place of {wanted}"
        if outcome == _DIED and "died 3 times" not in str(job.error):
            yield f"{job.error}"

    def _told_twice(self, job: Job) -> Iterable[str]:
        told = Counter(event.message for event in self._events[job.id])
        yield from (f"{message!r} {count} times" for message, count in told.items() if count > 1)
        ends = [event.once for event in self._events[job.id] if event.once in ("succeeded", "failed")]
        if len(ends) != 1:
            yield f"ends: {', '.join(ends) or 'none'}"

    def _training(self, job: Job) -> Iterable[str]:
        metrics = [event.data for event in self._events[job.id] if event.type == "metrics" and event.data]
        steps = [data["step"] for data in metrics]
        # A job whose training was killed three times has a part of them.
        if steps != list(range(1, len(steps) + 1)):
            yield f"steps {steps}"
        if _outcome(job) not in (_DIED, "invalid_training_file"):
            wanted = metrics[0]["total_steps"] if metrics else "some"
            if len(steps) != wanted:
                yield f"{len(steps)} steps of {wanted}"

    def _gate(self, job: Job) -> Iterable[str]:
        model, events = self._models.get(job.id), self._events[job.id]
        folder = self._serving.data / "models" / job.id
        if model is None:
            if folder.exists() or job.fine_tuned_model is not None:
                yield "a model without a row"
            return
        named = [event.number for event in events if event.once == "published"]
        passed = [
            event.number
            for event in events
            if event.type == "moderation_checks" and event.data is not None and event.data["passed"]
        ]
        if len(passed) != len(CHECKS) or not named or max(passed) > named[0]:
            yield f"{model.id} passed {len(passed)} checks"
        if job.status != "succeeded" or not folder.is_dir():
            yield f"{model.id} of a job that is {job.status}"

    def unrecorded(self) -> list[str]:
        """List what the books of the workflows have twice, or not as done."""
        books = sqlite3.connect(f"file:{self._serving.data / 'workflows.sqlite'}?mode=ro", uri=True)
        try:
            states = books.execute("SELECT workflow_uuid, status FROM workflow_status").fetchall()
            steps = books.execute("SELECT workflow_uuid, function_name FROM operation_outputs").fetchall()
        finally:
            books.close()
        ours = [(name, state) for name, state in states if str(name).startswith("ftjob-")]
        found = [f"{name} is {state}" for name, state in ours if state != "SUCCESS"]
        twice = Counter((name, step) for name, step in steps if str(name).startswith("ftjob-"))
        found += [f"{name}: {step} {n} times" for (name, step), n in twice.items() if n > 1]
        few = [f"{len(ours)} workflows of {len(self._jobs)} jobs"]
        return found if len(ours) >= len(self._jobs) else [*few, *found]

    def _left(self) -> tuple[str, ...]:
        waited_for(lambda: not self._serving.workers(), _GONE_S)
        return tuple(f"{each.kind} of {each.job_id}" for each in self._serving.workers())

    def _keys(self) -> Iterable[str]:
        key, data = self._serving.key.encode(), self._serving.data
        shown = self._serving.log.read_bytes().count(key)
        if shown != 1:
            yield f"{self._serving.log.name}: {shown} times"
        files = [path for path in data.rglob("*") if path.is_file() and key in path.read_bytes()]
        yield from (str(path.relative_to(data)) for path in files)

    def _bugs(self) -> tuple[str, ...]:
        lines: Sequence[str] = self._serving.log.read_text(encoding="utf-8").splitlines()
        return tuple(line for line in lines if "A bug" in line)[:20]


def _outcome(job: Job) -> str:
    return job.status if job.error is None else str(job.error["code"])
