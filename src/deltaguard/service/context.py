"""What routes and workflows share, and who is asking."""

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deltaguard.models.checkpoint import Checkpoint
from deltaguard.service.contents import Contents
from deltaguard.service.database import Sessions
from deltaguard.service.errors import ApiError
from deltaguard.service.keys import find_key
from deltaguard.service.settings import Settings
from deltaguard.service.tables import now
from deltaguard.service.tasks import FILES

SERVICE_ID = "service.id"
"""The file in a service's folder that tells it from others."""

_MINUTE = 60.0


@dataclass(frozen=True)
class Service:
    """A service that is open.

    Attributes:
        data: its folder.
        settings: what the operator decided.
        sessions: of the database.
        contents: of files, by their ids.
        opened_at: seconds since 1970.
        asked: when each organisation asked in the last minute; by `time.monotonic`.
        arriving: bytes of the uploads of each organisation that are being read.
        identities: fingerprints of weights, by what was looked at.
        aligned: the aligned models among these, to see whether their files have changed since.
    """

    data: Path
    settings: Settings
    sessions: Sessions
    contents: Contents
    opened_at: int = field(default_factory=now)
    asked: dict[str, deque[float]] = field(default_factory=dict[str, deque[float]])
    arriving: Counter[str] = field(default_factory=Counter[str])
    identities: dict[str, str] = field(default_factory=dict[str, str])
    aligned: dict[str, Checkpoint] = field(default_factory=dict[str, Checkpoint])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def id(self) -> str:
        """What tells it from other services; empty where it has not started since there are such ids."""
        file = self.data / SERVICE_ID
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def job(self, job_id: str) -> Path:
        """Name the folder in which a job works."""
        return self.data / "jobs" / job_id

    def fetched(self, job_id: str, file_id: str) -> Path:
        """Have a file's content as a file, for a job.

        Raises:
            FileNotFoundError: it was deleted.
        """
        return self.contents.fetch(file_id, self.job(job_id) / FILES)

    def published(self, job_id: str) -> Path:
        """Name the folder of the model that a job published."""
        return self.data / "models" / job_id

    def count_request(self, organisation: str) -> None:
        """Count a request of an organisation.

        Raises:
            ApiError: it asked too often in the last minute.
        """
        moment, most = time.monotonic(), self.settings.limits.requests_per_minute
        with self._lock:
            seen = self.asked.setdefault(organisation, deque())
            while seen and moment - seen[0] > _MINUTE:
                seen.popleft()
            if len(seen) >= most:
                wait = int(_MINUTE - (moment - seen[0])) + 1
                message = f"This organisation may ask {most} times a minute, and did. Wait {wait} s."
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)
            seen.append(moment)

    def expect(self, organisation: str, size: int) -> int:
        """Count the bytes of an upload as on their way, until `forget` is told of them.

        Returns:
            The bytes of all uploads of the organisation that are on their way, with these.
        """
        with self._lock:
            self.arriving[organisation] += size
            return self.arriving[organisation]

    def forget(self, organisation: str, size: int) -> None:
        """Count bytes that `expect` was told of as on their way no longer."""
        with self._lock:
            self.arriving[organisation] -= size


@dataclass(frozen=True)
class Caller:
    """Who is asking.

    Attributes:
        organisation: whose files, jobs and models there are for them.
        key_id: of the key they showed.
        is_operator: whether they run the service.
    """

    organisation: str
    key_id: str
    is_operator: bool = False


def service_of(request: Request) -> Service:
    """Find the service of the application that answers a request."""
    return request.app.state.service


Open = Annotated[Service, Depends(service_of)]
_BEARER = HTTPBearer(auto_error=False, description="A key of `deltaguard keys create`.")


def caller_of(
    service: Open, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Caller:
    """Find out who is asking, by their key.

    Raises:
        ApiError: there is no key, or none that is known.
    """
    caller = known_caller(service, None if shown is None else shown.credentials)
    service.count_request(caller.organisation)
    return caller


def known_caller(service: Service, key: str | None) -> Caller:
    """Find out whose key that is.

    Raises:
        ApiError: there is no key, or none that is known.
    """
    if key is None:
        raise ApiError(401, "Show your key: `Authorization: Bearer dg-...`.", code="missing_api_key")
    with service.sessions.reading() as session:
        known = find_key(session, key)
        if known is None:
            raise ApiError(401, "This key is not known, or was revoked.", code="invalid_api_key")
        return Caller(known.organisation, known.id, is_operator=known.is_operator)


Asking = Annotated[Caller, Depends(caller_of)]


def maker_of(
    service: Open, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Caller:
    """Find out who makes a job, who is not to ask again by itself where it asked too often.

    Sent again by the client itself, the request would be taken for the last one that was like it.

    Raises:
        ApiError: as `caller_of`.
    """
    try:
        return caller_of(service, shown)
    except ApiError as error:
        error.is_final = True
        raise


Making = Annotated[Caller, Depends(maker_of)]


def uploading_caller(
    service: Open, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Caller:
    """Find out who uploads, whose request was counted before its body was read.

    Raises:
        ApiError: there is no key, or none that is known.
    """
    return known_caller(service, None if shown is None else shown.credentials)


Uploading = Annotated[Caller, Depends(uploading_caller)]


def operator_of(caller: Asking) -> Caller:
    """Find out which operator is asking.

    Raises:
        ApiError: it is a customer.
    """
    if not caller.is_operator:
        message = "This takes an operator's key: `deltaguard keys create NAME --operator`."
        raise ApiError(403, message, code="not_an_operator")
    return caller


Operating = Annotated[Caller, Depends(operator_of)]
