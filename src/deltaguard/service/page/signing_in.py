"""People who have signed in with a key: who they are for a request, and that a button was theirs to press.

A browser keeps a random token in a cookie that no script reads; stored is its hash, with the key that was
shown. It ends when it is signed out, after half a day, and with its key.
"""

from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from secrets import token_urlsafe
from typing import Annotated

from fastapi import Depends, Form, Request
from fastapi.responses import Response
from sqlalchemy import delete, select

from deltaguard.service.context import Caller, Open, Service, known_caller
from deltaguard.service.database import new_id
from deltaguard.service.errors import ApiError
from deltaguard.service.tables import Key, SignIn, now

COOKIE = "deltaguard"
THEN = r"^/((jobs|files|models)(/[\w-]*)?)?$"
"""Pages to which a sign-in leads; never another site's, as `//name` would be."""

_LIFE_S = 12 * 3600


class SignInNeededError(Exception):
    """Nobody is signed in."""


@dataclass(frozen=True)
class Visitor:
    """Somebody who has signed in.

    Attributes:
        caller: who they are to the API.
        token: of the cookie.
    """

    caller: Caller
    token: str

    @property
    def form_token(self) -> str:
        """What each form holds: another site knows it as little as the cookie, which it follows from."""
        return sha256(f"form {self.token}".encode()).hexdigest()


def sign_in(service: Service, key: str) -> str:
    """Take a key that somebody shows, and make the token of their cookie.

    Raises:
        ApiError: the key is unknown or revoked, or its organisation asks too often.
    """
    token, known = token_urlsafe(32), known_caller(service, key)
    service.count_request(known.organisation)
    with service.sessions.begin() as session:
        session.execute(delete(SignIn).where(SignIn.expires_at <= now()))
        expires_at = now() + _LIFE_S
        new = SignIn(id=new_id("signin"), sha256=_hash(token), key_id=known.key_id, expires_at=expires_at)
        session.add(new)
    return token


def sign_out(service: Service, visitor: Visitor) -> None:
    """Forget a token, so that it is taken no more wherever it was kept."""
    with service.sessions.begin() as session:
        session.execute(delete(SignIn).where(SignIn.sha256 == _hash(visitor.token)))


def keep_cookie(response: Response, request: Request, token: str) -> None:
    """Have a browser keep a token."""
    response.set_cookie(
        COOKIE,
        token,
        max_age=_LIFE_S,
        httponly=True,
        samesite="lax",
        # Behind whoever speaks TLS uvicorn learns the scheme from `X-Forwarded-Proto`.
        secure=request.url.scheme == "https",
    )


def visitor_of(service: Open, request: Request) -> Visitor:
    """Find out who is looking, by their cookie.

    Raises:
        SignInNeededError: nobody who is signed in.
        ApiError: their organisation asked too often in the last minute.
    """
    token = request.cookies.get(COOKIE, "")
    query = (
        select(Key)
        .join(SignIn, SignIn.key_id == Key.id)
        .where(SignIn.sha256 == _hash(token), SignIn.expires_at > now(), Key.revoked_at.is_(None))
    )
    with service.sessions.reading() as session:
        known = session.scalar(query)
    if known is None:
        raise SignInNeededError
    service.count_request(known.organisation)
    return Visitor(Caller(known.organisation, known.id, is_operator=known.is_operator), token)


Visiting = Annotated[Visitor, Depends(visitor_of)]


def acting_of(visitor: Visiting, form_token: Annotated[str, Form(max_length=100)] = "") -> Visitor:
    """Find out who pressed a button on a page that was drawn for them.

    Raises:
        ApiError: the form is another site's, or of before they signed in anew.
    """
    if not compare_digest(form_token.encode(), visitor.form_token.encode()):
        message = "This button is of an older page. Go back, load the page again, and press it there."
        raise ApiError(403, message, code="invalid_form_token")
    return visitor


Acting = Annotated[Visitor, Depends(acting_of)]


def _hash(token: str) -> str:
    # A token of 256 random bits cannot be guessed, so that no slow hash is needed.
    return sha256(token.encode(errors="surrogatepass")).hexdigest()
