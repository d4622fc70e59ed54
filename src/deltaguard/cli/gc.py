"""`deltaguard gc`."""

from typing import Annotated

from cyclopts import Parameter, validators
from pydantic import BaseModel
from rich.table import Table as Drawn

from deltaguard.cli.sink import Int, Json, UserPath, emit
from deltaguard.errors import require_packages
from deltaguard.reports.text import size


class Removed(BaseModel):
    """Something that was removed, or would be.

    Attributes:
        place: in the service's folder.
        why: nothing needs it.
        bytes: its size.
        removed: False in a dry run, and where a process still works in it.
    """

    place: str
    why: str
    bytes: int
    removed: bool


class Collected(BaseModel):
    """All of it."""

    leftovers: list[Removed]


def gc(
    *,
    data: UserPath,
    days: Annotated[Int, Parameter(validator=validators.Number(gte=0))] = 7,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Remove what nothing in a fine-tuning service refers to; the service may run meanwhile.

    That is: folders of jobs that have ended, of deleted models and files, and of uploads that were cut off.
    What an operator has not decided about stays, and so do the stores of aligned models.

    Args:
        data: The service's folder.
        days: For so many days the folder of a job that has ended is kept, with its logs and samples.
        dry_run: List what would be removed, and remove nothing.
        json: Print one JSON document and nothing else on stdout.
    """
    require_packages("Cleaning up", "serve", "alembic", "sqlalchemy")
    from deltaguard.service.garbage import find_leftovers, remove_leftover
    from deltaguard.service.server import existing_service

    service = existing_service(data)
    found = [
        Removed(
            place=each.place,
            why=each.why,
            bytes=each.bytes,
            removed=not dry_run and remove_leftover(service, each),
        )
        for each in find_leftovers(service, days=days)
    ]
    table = Drawn("place", "why", "size", "removed")
    for each in found:
        table.add_row(each.place, each.why, size(each.bytes), "yes" if each.removed else "no")
    emit(Collected(leftovers=found), table if found else "There is nothing to remove.", as_json=json)
