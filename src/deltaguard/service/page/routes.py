"""The pages: what is shown at which address, and what the buttons on it do."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from deltaguard.service import files, jobs, reviewing
from deltaguard.service.context import Caller, Open
from deltaguard.service.errors import ApiError, not_found
from deltaguard.service.page import asking
from deltaguard.service.page.curve import loss_chart, read_losses
from deltaguard.service.page.drawing import HEADERS, Drawing, PageRoute, drawing_of
from deltaguard.service.page.job_parts import read_events, read_gate, read_restored, read_samples
from deltaguard.service.page.signing_in import COOKIE, THEN, Acting, Visiting, keep_cookie, sign_in, sign_out
from deltaguard.service.paging import After, page
from deltaguard.service.reviewing import Decide, blocked_jobs
from deltaguard.service.schemas import Text
from deltaguard.service.tables import UNFINISHED, File, Job, Model

router = APIRouter(route_class=PageRoute, include_in_schema=False, default_response_class=HTMLResponse)

_LISTED = 50
_LIVE_S, _QUIET_S = 3, 20
"""Seconds between two looks of a page at what changed: of jobs under way, and of a list without any."""

Drawn = Annotated[Drawing, Depends(drawing_of)]
Then = Annotated[str, Query(pattern=THEN)]


@router.get("/static/page.css")
def style(drawing: Drawn) -> Response:
    """Give the style of all pages."""
    return Response(drawing.style, media_type="text/css", headers=HEADERS)


@router.get("/static/page.js")
def script(drawing: Drawn) -> Response:
    """Give the script of all pages."""
    return Response(drawing.script, media_type="text/javascript", headers=HEADERS)


@router.get("/sign-in")
def show_sign_in(drawing: Drawn, then: Then = "/") -> Response:
    """Ask for a key."""
    return drawing.page("sign_in", None, then=then, problem=None)


@router.post("/sign-in")
def take_key(
    service: Open,
    drawing: Drawn,
    request: Request,
    key: Annotated[str, Form(max_length=200)],
    then: Annotated[str, Form(pattern=THEN)] = "/",
) -> Response:
    """Sign somebody in who shows a key."""
    # There is no token yet that a form of another site could lack.
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ApiError(403, "Sign in on this service's own page.")
    try:
        token = sign_in(service, key.strip())
    except ApiError as error:
        return drawing.page("sign_in", None, error.status, then=then, problem=error.message)
    response = RedirectResponse(then, 303, headers=HEADERS)
    keep_cookie(response, request, token)
    return response


@router.post("/sign-out")
def leave(service: Open, visitor: Acting) -> Response:
    """Sign somebody out."""
    sign_out(service, visitor)
    response = RedirectResponse("/sign-in", 303, headers=HEADERS)
    response.delete_cookie(COOKIE)
    return response


@router.get("/")
def show_jobs(service: Open, drawing: Drawn, visitor: Visiting, after: After = None) -> Response:
    """List jobs, the newest first."""
    own = Job.organisation == visitor.caller.organisation
    with service.sessions.reading() as session:
        found = page(session, Job, jobs.show_job, own, after=after, limit=_LISTED)
        blocked = blocked_jobs(session) if visitor.caller.is_operator else ()
    live = _LIVE_S if any(job.status in UNFINISHED for job in found.data) else _QUIET_S
    return drawing.page("jobs", visitor, found=found, blocked=blocked, live=live)


@router.get("/jobs/{job_id}")
def show_job(service: Open, drawing: Drawn, visitor: Visiting, job_id: str) -> Response:
    """Show a job: its state, what it did so far, and what can be done with it."""
    with service.sessions.reading() as session:
        job = _shown_job(session, visitor.caller, job_id)
        losses = read_losses(session, job_id)
        gate, events = read_gate(session, job_id), read_events(session, job_id)
        ids = [each for each in (job.training_file, job.validation_file, job.result_file) if each]
        own = (File.organisation == visitor.caller.organisation, File.id.in_(ids))
        known = session.scalars(select(File).where(*own)).all()
    return drawing.page(
        "job",
        visitor,
        job=job,
        live=_LIVE_S if job.status in UNFINISHED else None,
        chart=None if losses is None else loss_chart(losses),
        gate=gate,
        restored=read_restored(service, job_id),
        samples=read_samples(service, job_id) if gate else (),
        events=events,
        file_names={file.id: file.name for file in known},
    )


def _shown_job(session: Session, caller: Caller, job_id: str) -> Job:
    """Find a job of an organisation; for operators also those of others that the gate blocked.

    Raises:
        ApiError: there is none of that id for them.
    """
    if caller.is_operator:
        reviewed = select(Job).where(Job.id == job_id, Job.review.is_not(None))
        if (found := session.scalar(reviewed)) is not None:
            return found
    return jobs.find_job(session, caller, job_id)


@router.post("/jobs/{job_id}/review")
def review(
    service: Open,
    visitor: Acting,
    request: Request,
    job_id: str,
    decision: Annotated[Literal["release", "discard"], Form()],
    reason: Annotated[Text, Form(min_length=1, max_length=1000)],
) -> Response:
    """Decide as an operator about a model that the gate blocked, as the API does it."""
    if decision == "release":
        reviewing.release(service, visitor.caller, request, job_id, Decide(reason=reason))
    else:
        reviewing.discard(service, visitor.caller, job_id, Decide(reason=reason))
    return RedirectResponse(f"/jobs/{job_id}", 303, headers=HEADERS)


@router.post("/jobs/{job_id}/{action}")
def act_on_job(
    service: Open,
    visitor: Acting,
    request: Request,
    job_id: str,
    action: Literal["cancel", "pause", "resume"],
) -> Response:
    """Do with a job what a button says, as the API does it."""
    if action == "pause":
        jobs.pause_job(service, visitor.caller, job_id)
    else:
        {"cancel": jobs.cancel_job, "resume": jobs.resume_job}[action](
            service, visitor.caller, request, job_id
        )
    return RedirectResponse(f"/jobs/{job_id}", 303, headers=HEADERS)


@router.get("/files")
def show_files(service: Open, drawing: Drawn, visitor: Visiting, after: After = None) -> Response:
    """List files, the newest first."""
    own = File.organisation == visitor.caller.organisation
    with service.sessions.reading() as session:
        found = page(session, File, files.show_file, own, after=after, limit=_LISTED)
    return drawing.page("files", visitor, found=found)


@router.get("/files/{file_id}")
def download(service: Open, visitor: Visiting, file_id: str) -> Response:
    """Give a file to be saved."""
    return files.file_content(service, visitor.caller, file_id)


@router.post("/files/{file_id}/delete")
def delete_file(service: Open, visitor: Acting, file_id: str) -> Response:
    """Remove a file for good, unless a job still needs it."""
    files.delete_file(service, visitor.caller, file_id)
    return RedirectResponse("/files", 303, headers=HEADERS)


@router.get("/models")
def show_models(service: Open, drawing: Drawn, visitor: Visiting, name: str | None = None) -> Response:
    """List the models that can be asked, with a box to ask them in."""
    return _models(service, drawing, visitor, chosen=name, asked="", answers=())


@router.post("/models")
def ask_models(
    service: Open,
    drawing: Drawn,
    visitor: Acting,
    request: Request,
    name: Annotated[Text, Form(max_length=300)],
    message: Annotated[Text, Form(min_length=1, max_length=asking.LONGEST_MESSAGE)],
) -> Response:
    """Ask a model, and the aligned one that it is over, the same."""
    answers = asking.answers_of(service, visitor.caller, request, name, message)
    return _models(service, drawing, visitor, chosen=name, asked=message, answers=answers)


def _models(
    service: Open,
    drawing: Drawing,
    visitor: Visiting,
    *,
    chosen: str | None,
    asked: str,
    answers: tuple[asking.Said, ...],
) -> Response:
    own = select(Model).where(Model.organisation == visitor.caller.organisation)
    with service.sessions.reading() as session:
        published = session.scalars(own.order_by(Model.number.desc())).all()
    names = [*(model.id for model in published), *service.settings.models]
    if chosen is not None and chosen not in names:
        raise not_found("model", chosen)
    return drawing.page(
        "models",
        visitor,
        published=published,
        aligned=list(service.settings.models),
        names=names,
        chosen=chosen,
        longest=asking.LONGEST_MESSAGE,
        asked=asked,
        answers=answers,
    )
