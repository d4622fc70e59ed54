"""What a monitor reads at `/metrics`, in Prometheus' format: counts and times, never whose."""

import time
from collections.abc import Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

from deltaguard.service.context import Operating, Service
from deltaguard.service.inference import Answering
from deltaguard.service.tables import Job

router = APIRouter(tags=["operation"])

_STATES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """What is counted of an application.

    Attributes:
        registry: all of it.
        requests: answered, by method, route and status.
        seconds: until an answer was sent whole, by method and route.
    """

    def __init__(self, service: Service, inference: Answering) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "deltaguard_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "deltaguard_request_seconds",
            "Seconds until an answer was sent whole.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Queues(service, inference))


class _Queues(Collector):
    """Jobs by state and what waits, as they are when somebody looks."""

    def __init__(self, service: Service, inference: Answering) -> None:
        self._service, self._inference = service, inference

    @override
    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._service.sessions.reading() as session:
            counted = session.execute(select(Job.status, func.count()).group_by(Job.status)).all()
            blocked = session.scalar(select(func.count()).where(Job.review == "waiting")) or 0
        of_state = {status: count for status, count in counted}  # noqa: C416  # rows are no tuples to pyright
        jobs = GaugeMetricFamily("deltaguard_jobs", "Jobs by state.", labels=("state",))
        for state in _STATES:
            jobs.add_metric((state,), of_state.get(state, 0))
        yield jobs
        waiting = GaugeMetricFamily("deltaguard_queue_length", "What waits.", labels=("queue",))
        waiting.add_metric(("jobs",), of_state.get("queued", 0))
        waiting.add_metric(("answers",), self._inference.waiting)
        waiting.add_metric(("blocked_models",), blocked)
        yield waiting


class Counted:
    """Counts every request of an application, by its route and not by its path, which may name things."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered, and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.seconds.labels(method, route).observe(time.perf_counter() - begun)


@router.get("/metrics")
def show_metrics(request: Request, _caller: Operating) -> Response:
    """Show counts and times, to operators alone."""
    metrics: Metrics = request.app.state.metrics
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
