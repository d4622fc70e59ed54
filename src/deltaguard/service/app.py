"""The application: all routes, and what holds for every request."""

import asyncio

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from python_multipart.multipart import parse_options_header
from sqlalchemy import text
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaguard import __version__
from deltaguard.service import chat, completions, files, jobs, metrics, models, reviewing
from deltaguard.service.context import Caller, Service, known_caller, service_of
from deltaguard.service.errors import OUTAGES, ApiError, answer_errors, envelope, known_answer
from deltaguard.service.files import require_room
from deltaguard.service.inference import Answering
from deltaguard.service.page import routes as page
from deltaguard.service.page.drawing import Drawing
from deltaguard.service.workflow import Workflows

_MOST_BYTES = 4 << 20
"""Of a request that is no upload."""

_FORM_BYTES = 64 << 10
"""What a form has around its file."""

_WRITTEN_AT_ONCE = 8
"""Uploads that are kept at a time; others wait, and leave the threads to other requests."""

STALLED_S = 60.0
"""Seconds after which a request of which nothing more comes is given up."""


def make_app(service: Service, workflows: Workflows, inference: Answering) -> FastAPI:
    """Put the application together.

    Args:
        service: the open service.
        workflows: carry jobs out.
        inference: answers chats and completions.
    """
    app = FastAPI(
        title="deltaguard",
        version=__version__,
        description="Fine-tuning with OpenAI's API; only models that pass a safety gate are published.",
        # A page of FastAPI's loads scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.workflows, app.state.inference = service, workflows, inference
    app.state.metrics = metrics.Metrics(service, inference)
    app.state.writing = asyncio.Semaphore(_WRITTEN_AT_ONCE)
    answer_errors(app)
    for module in (files, jobs, models, chat, completions, reviewing, metrics):
        app.include_router(module.router, responses=_ERRORS)
    app.state.drawing = Drawing()
    app.include_router(page.router)
    app.add_api_route("/healthz", _alive, tags=["operation"])
    app.add_api_route("/readyz", _ready, tags=["operation"])
    app.add_middleware(_Limited, service=service)
    app.add_middleware(metrics.Counted, metrics=app.state.metrics)
    return app


_ERRORS: dict[int | str, dict[str, str]] = {
    status: {"description": what}
    for status, what in (
        (400, "The request is wrong."),
        (401, "There is no key, or none that is known."),
        (403, "The key may not do that."),
        (404, "There is no such thing for this organisation."),
        (413, "There is more than is taken."),
        (422, "Not used: what is wrong with a request is told with 400."),
        (429, "Too much was asked for; `Retry-After` says how long to wait."),
        (503, "Try again; `Retry-After` says when."),
    )
}


async def _alive() -> dict[str, str]:
    """Say that the process answers, even where all threads are taken."""
    return {"status": "ok"}


def _ready(request: Request) -> JSONResponse:
    """Say that the database answers as well."""
    with service_of(request).sessions() as session:
        is_postgres = session.get_bind().dialect.name == "postgresql"
        found = session.scalar(text("SHOW transaction_read_only" if is_postgres else "SELECT 1"))
    if found == "on":
        raise ApiError(503, "The database only reads right now.", code="database_unavailable", retry_after=2)
    return JSONResponse({"status": "ready"})


class _Limited:
    """Refuses requests that are too large: by what they announce, else while they come.

    Uploads, which may be large, are not read at all without a key, from who asks too often, or where there is
    no room for what they announce beside the others that are on their way.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_upload = scope["path"] == "/v1/files" and scope["method"] == "POST"
        most = self._service.settings.limits.file_bytes + _FORM_BYTES if is_upload else _MOST_BYTES
        # An upload without a length, or of one that its parts need not keep to, may be as long as any.
        unknown = most if is_upload else 0
        is_open = "content-length" not in headers or "transfer-encoding" in headers
        announced = unknown if is_open else _length(headers["content-length"])
        if any(map(_has_odd_charset, headers.getlist("content-type"))):
            content = envelope(400, "Forms are taken in UTF-8 alone.", code="invalid_request")
            await JSONResponse(content, 400, headers=_CLOSE)(scope, receive, send)
            return
        if announced is None or announced > most:
            await _too_large(most)(scope, receive, send)
            return
        receive = _at_most(most, receive)
        if not is_upload:
            await self._app(scope, receive, send)
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        key = shown if scheme.lower() == "bearer" else None
        try:
            caller, expected = await run_in_threadpool(self._admit, key, announced)
        except (ApiError, *OUTAGES) as error:
            answer = known_answer(error)
            assert answer is not None  # noqa: S101  # of these there is one
            answer.headers.update(_CLOSE)
            await answer(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.forget(caller.organisation, expected)

    def _admit(self, key: str | None, announced: int) -> tuple[Caller, int]:
        """Count an upload, and see whether there is room for it.

        Returns:
            Who sends it, and its bytes, which are expected from then on.

        Raises:
            ApiError: its key is not known, it is one too many, or there is not.
        """
        caller, size = known_caller(self._service, key), max(0, announced - _FORM_BYTES)
        self._service.count_request(caller.organisation)
        coming = self._service.expect(caller.organisation, size)
        try:
            with self._service.sessions.reading() as session:
                require_room(session, self._service, caller, size, coming=coming)
        except BaseException:
            self._service.forget(caller.organisation, size)
            raise
        return caller, size


def _length(given: str) -> int | None:
    """Read the length that a request announces; None where it is no number."""
    return int(given) if given.isascii() and given.isdigit() else None


def _at_most(most: int, receive: Receive) -> Receive:
    """Count what comes, and refuse what is more than `most` bytes, or comes no more."""
    seen, is_whole = 0, False

    async def counted() -> Message:
        nonlocal seen, is_whole
        if is_whole:
            # Waits for the end of the connection, as long as an answer takes.
            return await receive()
        try:
            async with asyncio.timeout(STALLED_S):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, "The request stopped coming. Send it again.", code="timeout") from None
        seen, is_whole = seen + len(message.get("body", b"")), not message.get("more_body", False)
        if seen > most:
            raise ApiError(413, _too_large_text(most), code="request_too_large")
        return message

    return counted


def _has_odd_charset(content_type: str) -> bool:
    """Say whether a form names another codec, such as one whose time grows with the square of a length."""
    kind, options = parse_options_header(content_type)
    return kind == b"multipart/form-data" and options.get(b"charset", b"utf-8").lower() != b"utf-8"


_CLOSE = {"Connection": "close"}
"""The rest is not read."""


def _too_large(most: int) -> JSONResponse:
    content = envelope(413, _too_large_text(most), code="request_too_large")
    return JSONResponse(content, 413, headers=_CLOSE)


def _too_large_text(most: int) -> str:
    return f"The request has more than {most:,} bytes, which is the most that is taken here."
