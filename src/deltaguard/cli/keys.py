"""`deltaguard keys`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from pydantic import BaseModel
from rich.table import Table as Drawn

from deltaguard.cli.sink import Json, UserPath, emit
from deltaguard.errors import require_packages

if TYPE_CHECKING:
    from deltaguard.service.database import Sessions
    from deltaguard.service.tables import Key

keys = App(name="keys", help="Make, list and revoke the API keys of a fine-tuning service.")


class NewKey(BaseModel):
    """A key that was made."""

    organisation: str
    key: str


class KnownKey(BaseModel):
    """What is known of a key."""

    id: str
    organisation: str
    ends_with: str
    is_operator: bool
    created_at: int
    revoked_at: int | None


class KnownKeys(BaseModel):
    """All keys."""

    keys: list[KnownKey]


@keys.command
def create(
    organisation: str,
    /,
    *,
    data: UserPath,
    operator: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Make a key for an organisation, and show it this once.

    Args:
        organisation: Whose files, jobs and models it opens: lower-case letters, digits and hyphens.
        data: The service's folder.
        operator: The key is of somebody who runs the service: it also shows the blocked models of all
            organisations, releases and discards them, and reads `/metrics`.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.service.keys import create_key

    with _opened(data).begin() as session:
        made = NewKey(organisation=organisation, key=create_key(session, organisation, is_operator=operator))
    emit(made, made.key, as_json=json)


@keys.command(name="list")
def list_all(*, data: UserPath, json: Json = False) -> None:
    """List all keys by their last characters.

    Args:
        data: The service's folder.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.service.keys import list_keys

    with _opened(data).reading() as session:
        found = KnownKeys(keys=[_known(key) for key in list_keys(session)])
    table = Drawn("id", "organisation", "ends with", "of", "state")
    for key in found.keys:
        state = "valid" if key.revoked_at is None else "revoked"
        of = "operator" if key.is_operator else "customer"
        table.add_row(key.id, key.organisation, key.ends_with, of, state)
    emit(found, table, as_json=json)


@keys.command
def revoke(key_id: str, /, *, data: UserPath, json: Json = False) -> None:
    """Take a key back; the service does not accept it from that moment on.

    Args:
        key_id: As `deltaguard keys list` shows it.
        data: The service's folder.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.service.keys import revoke_key

    with _opened(data).begin() as session:
        found = _known(revoke_key(session, key_id))
    emit(found, f"Revoked {found.id} of {found.organisation}.", as_json=json)


def _known(key: "Key") -> KnownKey:
    return KnownKey(
        id=key.id,
        organisation=key.organisation,
        ends_with=key.hint,
        is_operator=key.is_operator,
        created_at=key.created_at,
        revoked_at=key.revoked_at,
    )


def _opened(data: Path) -> "Sessions":
    require_packages("Managing keys", "serve", "alembic", "sqlalchemy")
    from deltaguard.service.server import existing_service

    return existing_service(data).sessions
