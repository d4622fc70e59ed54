"""Parts of lists, the newest first."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Query
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from deltaguard.service.errors import ApiError
from deltaguard.service.schemas import Page
from deltaguard.service.tables import Table

TableT = TypeVar("TableT", bound=Table)
ItemT = TypeVar("ItemT")

After = Annotated[str | None, Query(max_length=300)]
Limit = Annotated[int, Query(ge=1, le=100)]


def page(
    session: Session,
    table: type[TableT],
    show: Callable[[TableT], ItemT],
    *where: ColumnElement[Any],
    after: str | None,
    limit: int,
    order: Literal["asc", "desc"] = "desc",
) -> Page[ItemT]:
    """Read a part of a list.

    Args:
        session: of the database.
        table: whose rows are listed.
        show: writes a row as the API does.
        where: what rows must be like, their organisation among it.
        after: the id of the last row of the part before; None begins the list.
        limit: rows at most.
        order: `desc` begins with the newest.

    Raises:
        ApiError: no row of the list has that id.
    """
    query = select(table).where(*where)
    if after is not None:
        last = session.scalar(query.where(table.id == after))
        if last is None:
            raise ApiError(
                400, f"The list has no {after!r} to go on after.", code="invalid_after", param="after"
            )
        query = query.where(table.number < last.number if order == "desc" else table.number > last.number)
    ordered = query.order_by(table.number.desc() if order == "desc" else table.number)
    rows = session.scalars(ordered.limit(limit + 1)).all()
    shown = [show(row) for row in rows[:limit]]
    ids = [row.id for row in rows[:limit]]
    return Page(
        data=shown,
        has_more=len(rows) > limit,
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
    )
