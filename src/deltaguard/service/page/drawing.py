"""Pages as answers: templates filled, what went wrong told in words, and what a browser may do with them."""

import re
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from functools import cached_property
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute

from deltaguard.reports.page import templates
from deltaguard.reports.palette import palette_css
from deltaguard.reports.text import size
from deltaguard.service.errors import KNOWN, known_failure
from deltaguard.service.page.signing_in import THEN, SignInNeededError, Visitor

_PACKAGE = "deltaguard.service.page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    # With no referrer at all, browsers would not say either where a form comes from.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Drawing:
    """Draws the pages of a service."""

    @cached_property
    def _templates(self) -> jinja2.Environment:
        found = templates(_PACKAGE)
        found.filters["iso"] = iso
        found.filters["size"] = size
        return found

    @cached_property
    def style(self) -> str:
        """The style of all pages: that of the reports, and what these have beyond it."""
        reports = files("deltaguard.reports") / "templates" / "style.css"
        own = files(_PACKAGE) / "static" / "page.css"
        return "\n".join((reports.read_text("utf-8"), palette_css(":root"), own.read_text("utf-8")))

    @cached_property
    def script(self) -> str:
        """The script of all pages."""
        return (files(_PACKAGE) / "static" / "page.js").read_text("utf-8")

    def page(self, template: str, visitor: Visitor | None, status: int = 200, **values: Any) -> HTMLResponse:
        """Draw a page.

        Args:
            template: its name, without `.html.jinja`.
            visitor: who is looking; None where nobody is signed in.
            status: of HTTP.
            values: what the template shows; escaped.
        """
        drawn = self._templates.get_template(f"{template}.html.jinja")
        # What imported templates draw needs it; these pages have no drawings before names.
        return HTMLResponse(drawn.render(visitor=visitor, swatches={}, **values), status, headers=HEADERS)


def drawing_of(request: Request) -> Drawing:
    """Find what draws the pages of the application that answers a request."""
    return request.app.state.drawing


class PageRoute(APIRoute):
    """A route for people: what goes wrong is a page, and who is not signed in is led to where they can."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Make what answers requests."""
        answer = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await answer(request)
            except SignInNeededError:
                is_page = request.method == "GET" and re.search(THEN, request.url.path)
                then = request.url.path if is_page else "/"
                return RedirectResponse(f"/sign-in?then={quote(then)}", 303, headers=HEADERS)
            except KNOWN as error:
                found = known_failure(error)
                assert found is not None  # noqa: S101  # it is of such a kind
                after = {} if found.retry_after is None else {"Retry-After": str(found.retry_after)}
                return _problem(request, found.status, found.message, after)
            except RequestValidationError as error:
                told = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
                return _problem(request, 400, f"{told}.")
            except HTTPException as error:
                return _problem(request, error.status_code, f"{error.detail}.")

        return answered


def _problem(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    found = drawing_of(request).page("problem", None, status, message=message)
    found.headers.update(headers or {})
    return found


def iso(seconds: int) -> str:
    """Write a time of the database as ISO 8601.

    Example:
        >>> iso(0)
        '1970-01-01T00:00:00+00:00'
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat()
