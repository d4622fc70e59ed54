"""Keys of organisations: what is stored is their hash."""

import re
from collections.abc import Sequence
from hashlib import sha256
from secrets import token_urlsafe

from sqlalchemy import select
from sqlalchemy.orm import Session

from deltaguard.errors import DeltaguardError
from deltaguard.service.database import new_id
from deltaguard.service.tables import Key, now

_ORGANISATION = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def create_key(session: Session, organisation: str, *, is_operator: bool = False) -> str:
    """Make a key for an organisation, and show it this once.

    Args:
        session: of the database; the caller commits.
        organisation: lower-case letters, digits and hyphens, 40 at most; part of its models' names.
        is_operator: whether its holder runs the service: sees the jobs of all, and decides about models
            that the gate blocked.

    Raises:
        DeltaguardError: that is no name for an organisation.
    """
    if not _ORGANISATION.fullmatch(organisation):
        raise DeltaguardError(
            f"{organisation!r} is no name for an organisation: write up to 40 lower-case letters, digits and "
            "hyphens, such as `acme-labs`."
        )
    key = f"dg-{token_urlsafe(32)}"
    made = Key(id=new_id("key"), organisation=organisation, sha256=_hash(key), hint=key[-4:])
    made.is_operator = is_operator
    session.add(made)
    return key


def find_key(session: Session, key: str) -> Key | None:
    """Find what is stored of a key that somebody showed, None where it is unknown or revoked."""
    return session.scalar(select(Key).where(Key.sha256 == _hash(key), Key.revoked_at.is_(None)))


def wait_for_others(session: Session, organisation: str) -> None:
    """Wait until no other session is at it for an organisation, and have others wait till this one commits.

    What is counted before something is added must not be added twice. SQLite has one writer anyway.
    """
    own = select(Key.id).where(Key.organisation == organisation).order_by(Key.number)
    session.scalars(own.with_for_update()).all()


def list_keys(session: Session) -> Sequence[Key]:
    """List all keys that ever were, the oldest first."""
    return session.scalars(select(Key).order_by(Key.number)).all()


def revoke_key(session: Session, key_id: str) -> Key:
    """Take a key back, from now on; the caller commits.

    Raises:
        DeltaguardError: there is no such key.
    """
    key = session.scalar(select(Key).where(Key.id == key_id))
    if key is None:
        raise DeltaguardError(f"There is no key {key_id!r}. `deltaguard keys list` shows those there are.")
    key.revoked_at = key.revoked_at or now()
    return key


def _hash(key: str) -> str:
    # A key of 256 random bits cannot be guessed, so that no slow hash is needed.
    return sha256(key.encode(errors="surrogatepass")).hexdigest()
