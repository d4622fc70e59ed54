"""The database: SQLite in the data folder, or Postgres by URL, brought up to date when a service starts."""

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, ExceptionContext, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from deltaguard.errors import DeltaguardError

_WAIT_MS = 30_000
KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_REACH = {"connect_timeout": 10, "tcp_user_timeout": _WAIT_MS, **KEEPALIVES}
"""Seconds, but for milliseconds and a count, after which a Postgres that is gone without a word counts so."""

_READ_ONLY = ("25006", "0A000")
"""SQLSTATEs of what a Postgres refuses that only reads, the second of a standby."""

_READING = {"postgresql_readonly": True}
"""Postgres' name for it; `_begin` reads it for SQLite."""


class Sessions(sessionmaker[Session]):
    """Makes sessions of a database: `begin()` those that may change it, `reading()` those that may not."""

    @contextmanager
    def reading(self) -> Generator[Session]:
        """Open a session that changes nothing, and that waits for nobody who does.

        Yields:
            The session; the database refuses changes in it.
        """
        with self() as session:
            session.connection(execution_options=_READING)
            yield session


def new_id(kind: str) -> str:
    """Make an id that nobody can guess, such as `file-3f…`."""
    return f"{kind}-{token_hex(12)}"


def database_url(data: Path, given: str | None) -> str:
    """Find the URL of the database: the one given, else that of a SQLite file in the data folder."""
    if given is None:
        return f"sqlite:///{(data / 'service.sqlite').absolute()}"
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        # Not from that error, which may have a part of a password.
        raise DeltaguardError(
            "`database_url` is none: write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME."
        ) from None
    # The driver that DBOS brings.
    is_plain = url.drivername in ("postgres", "postgresql")
    return (url.set(drivername="postgresql+psycopg") if is_plain else url).render_as_string(
        hide_password=False
    )


def make_engine(url: str) -> Engine:
    """Make what connects to a database, and raises its outages as such.

    Args:
        url: as `database_url` gives it.
    """
    is_sqlite = make_url(url).get_backend_name() == "sqlite"
    reach = {} if is_sqlite else _REACH
    engine = create_engine(url, pool_pre_ping=True, json_serializer=_as_json, connect_args=reach)
    if is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin)
    else:
        event.listen(engine, "handle_error", _tell_outage)
    return engine


def open_database(url: str, *, may_migrate: bool) -> Sessions:
    """Connect, and make the tables where there are none.

    Args:
        url: as `database_url` gives it.
        may_migrate: whether tables of an earlier release are brought up to date. The service that works in
            the folder does that alone, when it starts: one of an earlier release would not know them.

    Raises:
        DeltaguardError: the tables are of a later release, or of an earlier one and may not be changed;
            or the database does not answer.
    """
    engine = make_engine(url)
    try:
        _migrate(engine, may_migrate=may_migrate)
    except OperationalError as error:
        # Not the whole of it, which may have the statement's parameters.
        raise DeltaguardError(
            f"The database does not answer: {error.orig}. Start it, or change `database_url` in service.yaml."
        ) from error
    return Sessions(engine, expire_on_commit=False)


def _tell_outage(context: ExceptionContext) -> None:
    """Raise an outage where Postgres only reads, as after a failover: SQLAlchemy takes it for a bug."""
    found = context.connection
    only_reads = found is not None and _READING.items() <= found.get_execution_options().items()
    if getattr(context.original_exception, "sqlstate", None) in _READ_ONLY and not only_reads:
        # The next connection may lead to another server.
        context.is_disconnect = True
        # DBOS, too, tries again where it is told so.
        raise OperationalError(
            context.statement, None, context.original_exception, connection_invalidated=True
        )


def _as_json(value: Any) -> str:
    """Write a value as JSON whose text is as it is read: SQLite before 3.45 finds no key that is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    # Halves of characters have no bytes of their own.
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    # Transactions are begun by `_begin` alone.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={_WAIT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Any) -> None:
    reads = _READING.items() <= connection.get_execution_options().items()
    connection.exec_driver_sql(f"PRAGMA query_only={int(reads)}")
    # A transaction that reads first and then writes could not wait for another writer.
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _migrate(engine: Engine, *, may_migrate: bool) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]
    with engine.begin() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in known:
            raise DeltaguardError(
                f"The service's database is of a later release: its tables are of {found}, and this one "
                f"knows them up to {known[0]}. Install that release."
            )
        if found not in (None, known[0]) and not may_migrate:
            raise DeltaguardError(
                f"The service's database is of an earlier release: its tables are of {found}, and this one "
                f"works with {known[0]}. Only `deltaguard serve` brings it up to date, when it starts: start "
                "the service with this release first, or use the release that it runs with."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
