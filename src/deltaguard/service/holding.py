"""One service at a time on a Postgres, whatever folder it works in; a SQLite's folder is locked."""

import logging
import os
import threading
import time
from contextlib import suppress
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, func, select, text

from deltaguard.errors import DeltaguardError
from deltaguard.service.database import KEEPALIVES, make_engine
from deltaguard.service.errors import OUTAGES, cause_of

_NUMBER = int.from_bytes(sha256(b"deltaguard serve").digest()[:8], "big", signed=True)
"""Of the lock, one in each database."""

_TRIES, _AGAIN_S, _LOOK_S = 10, 0.5, 5.0
"""How often, and each how many seconds, a lock is tried that a killed service may still have; and how long
it is until a look whether the database was away, and the lock with it."""

_SESSION = text("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
_END = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE pid = :pid AND backend_start = :backend_start"
)

_LOGGER = logging.getLogger(__name__)


class Hold:
    """A lock that keeps other services from a Postgres for as long as this process lives."""

    def __init__(self, url: str) -> None:
        """Take it.

        Args:
            url: of the database, as `database_url` gives it.

        Raises:
            DeltaguardError: another service works with the database, or it does not answer.
        """
        self._engine = make_engine(url)
        self._session: Any = None
        try:
            self._connection: Connection | None = self._taken()
        except OUTAGES as error:
            raise DeltaguardError(f"The database does not answer: {cause_of(error)}") from error
        except DeltaguardError:
            self._engine.dispose()
            raise

    def keep(self) -> None:
        """Look after it from now on; where another service has taken it meanwhile, end this process."""
        threading.Thread(target=self._look_after, daemon=True).start()

    def release(self) -> None:
        """Give it up."""
        if self._connection is not None:
            self._connection.close()
        self._engine.dispose()

    def renew(self) -> None:
        """Take it again where the database was away.

        Raises:
            DeltaguardError: another service has it now.
        """
        held, self._connection = self._connection, None
        if held is not None:
            try:
                held.execute(text("SELECT 1"))
            except OUTAGES:
                with suppress(*OUTAGES):
                    held.close()
            else:
                self._connection = held
                return
        with suppress(*OUTAGES):
            self._connection = self._taken()

    def _look_after(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            try:
                self.renew()
            except DeltaguardError as error:
                _LOGGER.error("The service ends: %s", error)  # noqa: TRY400  # no bug
                # What is under way goes on where the other one, or the next start, takes it up.
                os._exit(1)

    def _taken(self) -> Connection:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        for name, seconds in KEEPALIVES.items():
            # What was held by a machine that is gone is free again within a minute.
            connection.execute(text(f"SET tcp_{name} = {seconds}"))
        if self._session is not None:
            # A server may not have noticed that a connection was cut, whose session has the lock.
            connection.execute(_END, self._session)
        for _ in range(_TRIES):
            if connection.scalar(select(func.pg_try_advisory_lock(_NUMBER))):
                self._session = connection.execute(_SESSION).mappings().one()
                return connection
            time.sleep(_AGAIN_S)
        connection.close()
        raise DeltaguardError(
            "Another service works with this database: that of the same folder on another machine, or of a "
            "copy of the folder. End that one; where its machine is gone, try again in a minute."
        )
