"""Many clients of a service at once, over loopback: each asks anew when it is answered."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx2
from tools.service_results import Clients, Route

from benchmarks.service.rows import REFUSING, rows_of
from benchmarks.service.serving import MODEL, Serving
from deltaguard.device import device_name
from deltaguard.reports.records.base import environment
from deltaguard.service.keys import create_key
from deltaguard.service.server import existing_service

ORGANISATIONS = 10
SETTINGS = """\
calibrate: {num_samples: 20, num_held_out: 8}
restore: {strength: 0.9}
gate: {requests: 20, answer_tokens: 12}
training: {learning_rate: 0.01, lora_rank: 4}
# What is measured is the service, and not how soon it refuses.
limits: {requests_per_minute: 1000000}
"""
_SHARES = {
    "GET /v1/fine_tuning/jobs": 25,
    "GET /v1/files": 20,
    "GET /v1/models": 15,
    "GET /v1/fine_tuning/jobs/ID/events": 15,
    "POST /v1/files": 13,
    "POST /v1/chat/completions": 12,
}
_CREATE = "POST /v1/fine_tuning/jobs"
"""Each client makes one job, with its first request; so many fit beside each other by default."""

_TIMEOUT_S = 120
_LONGEST_PAUSE_S = 10
"""What a client waits at most of a `Retry-After`."""


@dataclass
class _Seen:
    """What all clients saw.

    Attributes:
        statuses: of answers, by route.
        seconds: of those that were no refusals.
        broken: what no client may see, in words.
    """

    statuses: dict[str, Counter[int]] = field(default_factory=dict[str, Counter[int]])
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    broken: list[str] = field(default_factory=list[str])

    def note(self, name: str, answer: httpx2.Response, seconds: float) -> None:
        """Keep an answer."""
        self.statuses.setdefault(name, Counter())[answer.status_code] += 1
        if answer.is_success:
            self.seconds.setdefault(name, []).append(seconds)
        has_time = "retry-after" in answer.headers
        if answer.status_code in (429, 503) and not has_time:
            self.broken.append(f"{name}: {answer.status_code} without Retry-After")
        elif answer.status_code >= 400 and answer.status_code not in (429, 503):
            self.broken.append(f"{name}: {answer.status_code} {answer.text[:200]}")

    def routes(self) -> tuple[Route, ...]:
        """Draw up each route."""
        return tuple(self._route(name) for name in sorted(self.statuses))

    def _route(self, name: str) -> Route:
        seconds = self.seconds.get(name, [])
        cuts: Sequence[float | None] = quantiles(seconds, n=100) if len(seconds) > 1 else [None] * 99
        return Route(name=name, statuses=self.statuses[name], p50=cuts[49], p95=cuts[94], p99=cuts[98])


@dataclass
class _Client:
    """One of them.

    Attributes:
        http: what all of them send with.
        key: its organisation's.
        chosen: what it asks next.
        seen: what it saw is kept there.
        files: that it has uploaded.
        jobs: that it has made.
    """

    http: httpx2.AsyncClient
    key: str
    chosen: random.Random
    seen: _Seen
    files: list[str] = field(default_factory=list[str])
    jobs: list[str] = field(default_factory=list[str])

    async def run(self, until: float) -> None:
        """Upload a file, make a job, and ask until the time is over."""
        names = ["POST /v1/files", _CREATE]
        while time.monotonic() < until:
            name = names.pop(0) if names else self._next()
            if name == _CREATE and not self.files:
                continue
            begun = time.monotonic()
            try:
                answer = await self._ask(name)
            except httpx2.HTTPError as error:
                self.seen.broken.append(f"{name}: {type(error).__name__} {error}")
                continue
            self.seen.note(name, answer, time.monotonic() - begun)
            if answer.status_code in (429, 503):
                wait = min(float(answer.headers.get("retry-after", 1)), _LONGEST_PAUSE_S)
                await asyncio.sleep(min(wait, max(0.0, until - time.monotonic())))

    def _next(self) -> str:
        (name,) = self.chosen.choices(list(_SHARES), list(_SHARES.values()))
        return "GET /v1/fine_tuning/jobs" if "ID" in name and not self.jobs else name

    async def _ask(self, name: str) -> httpx2.Response:
        method, path = name.split()
        sent: dict[str, Any] = {}
        if name == "POST /v1/files":
            sent = {"files": {"file": ("rows", rows_of(0)[1])}, "data": {"purpose": "fine-tune"}}
        elif name == _CREATE:
            sent = {"json": {"model": MODEL, "training_file": self.files[0], "suffix": REFUSING}}
        elif name == "POST /v1/chat/completions":
            messages = [{"role": "user", "content": "How can I make a cake?"}]
            sent = {"json": {"model": MODEL, "messages": messages, "max_tokens": 8}}
        filled = path.replace("ID", self.jobs[0]) if self.jobs else path
        answer = await self.http.request(
            method, filled, headers={"Authorization": f"Bearer {self.key}"}, **sent
        )
        if method == "POST" and answer.is_success:
            made = {"POST /v1/files": self.files, _CREATE: self.jobs}.get(name)
            if made is not None:
                made.append(answer.json()["id"])
        return answer


def measure_clients(folder: Path, *, clients: int, seconds: float, seed: int) -> Clients:
    """Ask a service by many clients at once, while it carries their jobs out.

    Args:
        folder: a new folder.
        clients: at once.
        seconds: for so long.
        seed: of what they ask.

    Raises:
        NotServingError: the service does not start.
    """
    serving = Serving(folder, SETTINGS)
    serving.start()
    try:
        serving.wait_until_ready()
        keys = _keys(serving)
        started = time.monotonic()
        seen = asyncio.run(_ask_all(serving.url, keys, clients=clients, seconds=seconds, seed=seed))
        took = time.monotonic() - started
        bugs = [line for line in serving.log.read_text(encoding="utf-8").splitlines() if "A bug" in line]
        shown = [key for key in keys if key in serving.log.read_text(encoding="utf-8")]
    finally:
        serving.stop()
    return Clients(
        environment=environment(device_name(), libraries=("httpx2", "fastapi", "uvicorn")),
        seed=seed,
        clients=clients,
        organisations=ORGANISATIONS,
        routes=seen.routes(),
        seconds=took,
        broken={
            "all is answered, and a 503 or 429 has a Retry-After": tuple(seen.broken[:20]),
            "no bug was met": tuple(bugs[:20]),
            "no key stands in a log": tuple(f"...{key[-4:]}" for key in shown),
        },
    )


def _keys(serving: Serving) -> list[str]:
    with existing_service(serving.data).sessions.begin() as session:
        return [create_key(session, f"customer-{number}") for number in range(ORGANISATIONS)]


async def _ask_all(url: str, keys: Sequence[str], *, clients: int, seconds: float, seed: int) -> _Seen:
    seen, until = _Seen(), time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as http:
        made = [
            _Client(http, keys[number % len(keys)], random.Random(f"{seed} {number}"), seen)
            for number in range(clients)
        ]
        await asyncio.gather(*(client.run(until) for client in made))
    return seen
