"""Files: uploads, and what jobs write."""

import logging
from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect
from typing_extensions import override

from deltaguard.service.context import Asking, Caller, Open, Service, Uploading
from deltaguard.service.database import new_id
from deltaguard.service.errors import ApiError, not_found
from deltaguard.service.keys import wait_for_others
from deltaguard.service.paging import After, page
from deltaguard.service.patience import AWAY
from deltaguard.service.schemas import Deleted, FileObject, Page
from deltaguard.service.tables import UNFINISHED, File, Job
from deltaguard.service.tasks import FILES, METRICS
from deltaguard.text import shortened, writable

_LONGEST_NAME = 512
_FIELDS = ("file", "purpose")
_LOGGER = logging.getLogger(__name__)


class _FormRoute(APIRoute):
    """Reads a form with one file and a few short fields, of which more would be kept in memory."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_first(request: Request) -> Response:
            if request.method == "POST":
                try:
                    # Kept by the request, which reads a form once.
                    form = await request.form(max_files=1, max_fields=8, max_part_size=4096)
                except ClientDisconnect as error:
                    raise HTTPException(400, "The upload was cut off") from error
                if unknown := next((name for name in form if name not in _FIELDS), None):
                    await form.close()
                    message = f"{unknown} is not known here: an upload has file and purpose."
                    raise ApiError(400, message, code="invalid_request", param=unknown)
            return await handle(request)

        return read_first


router = APIRouter(prefix="/v1/files", tags=["files"], route_class=_FormRoute)


def find_file(session: Session, caller: Caller, file_id: str) -> File:
    """Find a file of an organisation.

    Raises:
        ApiError: there is none of that id, or it is another organisation's.
    """
    found = session.scalar(select(File).where(File.id == file_id, File.organisation == caller.organisation))
    if found is None:
        raise not_found("file", file_id)
    return found


def show_file(file: File) -> FileObject:
    """Write a file as the API does."""
    return FileObject(
        id=file.id, bytes=file.bytes, created_at=file.created_at, filename=file.name, purpose=file.purpose
    )


@router.post("")
async def upload(
    service: Open,
    caller: Uploading,
    request: Request,
    file: UploadFile,
    purpose: Annotated[Literal["fine-tune"], Form()],
) -> FileObject:
    """Take a training or validation file."""
    async with request.app.state.writing:
        return await run_in_threadpool(keep_upload, service, caller, file, purpose)


def keep_upload(service: Service, caller: Caller, file: UploadFile, purpose: str) -> FileObject:
    """Keep an uploaded file.

    Args:
        service: the service.
        caller: whose file it is.
        file: as it came.
        purpose: of the file.

    Raises:
        ApiError: it is empty, or there is no room for it.
    """
    file_id, most = new_id("file"), service.settings.limits.file_bytes
    if file.size is not None and file.size > most:
        message = f"The file has {file.size:,} bytes, and {most:,} are taken at most."
        raise ApiError(413, message, code="file_too_large", param="file")
    if not file.size:
        raise ApiError(400, "The file is empty.", code="empty_file", param="file")
    size = service.contents.put(file_id, file.file)
    name = shortened(writable(file.filename or "file").replace("\0", "\\x00"), _LONGEST_NAME)
    new = File(id=file_id, organisation=caller.organisation, name=name, purpose=purpose, bytes=size)
    try:
        with service.sessions.begin() as session:
            # Anew: others may have come while this one was written.
            wait_for_others(session, caller.organisation)
            require_room(session, service, caller, size)
            session.add(new)
    except ApiError:
        service.contents.remove(file_id)
        raise
    return show_file(new)


def require_room(session: Session, service: Service, caller: Caller, size: int, *, coming: int = 0) -> None:
    """Refuse a file that does not fit beside those that its organisation has.

    Args:
        session: of the database.
        service: the service.
        caller: whose file it is.
        size: of the file.
        coming: bytes of all uploads of the organisation that are on their way, this one among them.

    Raises:
        ApiError: it does not fit, or not yet.
    """
    own = select(func.sum(File.bytes)).where(File.organisation == caller.organisation)
    taken, most = session.scalar(own) or 0, service.settings.limits.all_bytes
    if taken + size > most:
        message = f"This organisation's files have {taken:,} bytes, and {most:,} may be: delete some."
        raise ApiError(413, message, code="storage_full", param="file")
    if taken + coming > most:
        message = "Other uploads of this organisation are on their way, and leave no room for this yet."
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after=5)


@router.get("")
def list_files(
    service: Open,
    caller: Asking,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Page[FileObject]:
    """List an organisation's files."""
    where = [File.organisation == caller.organisation]
    where += [File.purpose == purpose] if purpose is not None else []
    with service.sessions.reading() as session:
        return page(session, File, show_file, *where, after=after, limit=limit, order=order)


@router.get("/{file_id}")
def retrieve_file(service: Open, caller: Asking, file_id: str) -> FileObject:
    """Describe a file."""
    with service.sessions.reading() as session:
        return show_file(find_file(session, caller, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse)
def file_content(service: Open, caller: Asking, file_id: str) -> StreamingResponse:
    """Give a file back, byte for byte."""
    with service.sessions.reading() as session:
        found = find_file(session, caller, file_id)
    # Never a type that a browser would run or draw.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
    headers["Content-Length"] = str(found.bytes)
    parts = service.contents.parts(found.id)
    try:
        # Before the answer begins: later nobody could be told that the object store does not answer.
        first = next(parts, b"")
    except FileNotFoundError:
        # Deleted meanwhile.
        raise not_found("file", file_id) from None
    parts = chain([first], parts)
    return StreamingResponse(parts, media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
def delete_file(service: Open, caller: Asking, file_id: str) -> Deleted:
    """Remove a file for good, unless a job still needs it."""
    with service.sessions.begin() as session:
        found = find_file(session, caller, file_id)
        of_file = select(Job.id).where(or_(Job.training_file == file_id, Job.validation_file == file_id))
        using = session.scalar(of_file.where(Job.status.in_(UNFINISHED)))
        ended = session.scalars(of_file).all()
        if using is not None:
            message = f"The job {using} still needs this file: cancel it first."
            raise ApiError(400, message, code="file_in_use", param="file_id")
        session.delete(found)
    service.contents.remove(file_id)
    # Where contents are kept elsewhere, jobs that have ended still have theirs.
    for job_id in ended:
        (service.job(job_id) / FILES / file_id).unlink(missing_ok=True)
    return Deleted(id=file_id, object="file")


def keep_result(service: Service, job_id: str) -> int | None:
    """Keep the content of a job's metrics, in no transaction: a store of objects may take its time.

    Args:
        service: the service.
        job_id: of the job, whose folder has the file.

    Returns:
        Its bytes, for `add_result`; None where there is no such file, or the job has it or has ended, or it
        cannot be kept: a job goes on, or ends, without.
    """
    source = service.job(job_id) / METRICS
    with service.sessions.reading() as session:
        known, status = session.execute(select(Job.result_file, Job.status).where(Job.id == job_id)).one()
    if known is not None or status not in UNFINISHED or not source.is_file():
        return None
    try:
        with source.open("rb") as content:
            return service.contents.put(_result_id(job_id), content)
    except AWAY:
        raise
    except Exception:
        # Of a full disk, or of any store of objects.
        _LOGGER.exception("The metrics of %s are not kept", job_id)
        return None


def add_result(session: Session, job: Job, size: int) -> None:
    """Give a job the file with its metrics, once; the caller commits.

    Args:
        session: of the database.
        job: the job.
        size: bytes of the content that `keep_result` has kept.
    """
    if job.result_file is not None:
        return
    file_id, name, purpose = _result_id(job.id), "step_metrics.csv", "fine-tune-results"
    session.add(File(id=file_id, organisation=job.organisation, name=name, purpose=purpose, bytes=size))
    job.result_file = file_id


def _result_id(job_id: str) -> str:
    # The same at a second try, so that a kill in between leaves nothing behind.
    return f"file-result-{job_id.removeprefix('ftjob-')}"
