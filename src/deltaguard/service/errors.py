"""Failures as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import exc
from starlette.exceptions import HTTPException

from deltaguard.errors import MOST_PROBLEMS, DeltaguardError

_LOGGER = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


OUTAGES = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)
"""What SQLAlchemy raises where the database is locked, full or gone, or all connections to it are taken."""


class ApiError(Exception):
    """A request that cannot be met, and why.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what to do.
        code: for programs.
        param: the field of the request that is wrong.
        retry_after: seconds after which it may be tried again.
        is_final: tells clients not to try again by themselves.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.is_final = retry_after, is_final


KNOWN = (ApiError, *OUTAGES, exc.DataError, DeltaguardError, OSError)
"""Failures that are no bugs."""


def not_found(kind: str, name: str) -> ApiError:
    """Say that there is nothing of that name, or that it is another organisation's: both are the same."""
    code = "model_not_found" if kind == "model" else "not_found"
    return ApiError(404, f"There is no {kind} {name!r}.", code=code, param=kind)


def envelope(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Write an error as the API answers it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def cause_of(error: Exception) -> object:
    """Leave out of an error of the database its statement's parameters, such as the hash of a key."""
    return error.orig if isinstance(error, exc.DBAPIError) else error


def known_failure(error: Exception) -> ApiError | None:
    """Say what a failure that is no bug is to who asked, and to the log; None where it may be one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OUTAGES):
        _LOGGER.error("The database does not answer: %s", cause_of(error))
        message = "The database does not answer right now. Try again."
        return ApiError(503, message, code="database_unavailable", retry_after=2)
    if isinstance(error, exc.DataError):
        # Such as a zero byte in an id, which Postgres takes for no text.
        _LOGGER.warning("The database does not take a value: %s", error.orig)
        message = "Something in this request cannot be kept or looked up, such as a zero byte."
        return ApiError(400, message, code="invalid_request")
    if isinstance(error, DeltaguardError | OSError):
        # Such as a disk that is full; its message names places on this machine.
        _LOGGER.error("A request cannot be met: %s", error)
        message = "The service cannot do this right now; its operator finds out why in the log."
        return ApiError(503, message, code="unavailable", retry_after=30)
    return None


def known_answer(error: Exception) -> JSONResponse | None:
    """Write the answer to a failure that is no bug; None where it may be one."""
    found = known_failure(error)
    if found is None:
        return None
    headers = {} if found.retry_after is None else {"Retry-After": str(found.retry_after)}
    headers |= {"x-should-retry": "false"} if found.is_final else {}
    # Of what is too large the rest is not read.
    headers |= {"Connection": "close"} if found.status == 413 else {}
    return _response(found.status, found.message, found.code, found.param, headers)


def answer_errors(app: FastAPI) -> None:
    """Have an application answer every failure in that form, FastAPI's own and bugs among them."""

    def _known(_request: Request, error: Exception) -> JSONResponse:
        found = known_answer(error)
        assert found is not None  # noqa: S101  # registered for such errors alone
        return found

    for kind in KNOWN:
        app.add_exception_handler(kind, _known)

    @app.exception_handler(RequestValidationError)
    def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()[:MOST_PROBLEMS]
        fields = [".".join(map(str, each["loc"][1:])) for each in problems]
        told = "; ".join(
            f"`{field}`: {each['msg']}" if field else each["msg"]
            for field, each in zip(fields, problems, strict=True)
        )
        return _response(400, f"{told}.", "invalid_request", fields[0] or None)

    @app.exception_handler(HTTPException)
    def _http(_request: Request, error: HTTPException) -> JSONResponse:
        # Whatever fails while a body is read is a 400 to FastAPI, and behind it stands why.
        why = error.__cause__
        found = known_answer(why) if error.status_code == 400 and isinstance(why, Exception) else None
        return found or _response(error.status_code, f"{error.detail}.", None, None, error.headers or {})

    @app.exception_handler(Exception)
    def _bug(request: Request, error: Exception) -> JSONResponse:
        _LOGGER.error("A bug, on %s %s", request.method, request.url.path, exc_info=error)
        return _response(500, "This is a bug of the service. Its operator finds it in the log.", "bug", None)


def _response(
    status: int,
    message: str,
    code: str | None,
    param: str | None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    content = envelope(status, message, code=code, param=param)
    return JSONResponse(content, status, headers=dict(headers or {}))
