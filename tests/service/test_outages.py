"""A database that is locked or full, and a disk that is: told with when to come back, and no bug."""

import errno
import sqlite3
from contextlib import contextmanager
from tempfile import SpooledTemporaryFile

import openai
import pytest
import starlette.formparsers
from clients import ROW, uploaded
from sqlalchemy import create_engine, delete, select
from sqlalchemy.event import listen
from sqlalchemy.exc import DataError, OperationalError

from deltaguard.service import database, files
from deltaguard.service.tables import File


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(database, "_WAIT_MS", 50)


@contextmanager
def locked(data):
    """Hold the database as another program would that writes to it."""
    other = sqlite3.connect(data / "service.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


def changes(client):
    """Ask by every kind of route for what changes something."""
    return (
        lambda: client.files.create(file=("x", b"{}"), purpose="fine-tune"),
        lambda: client.files.delete("file-1"),
        lambda: client.fine_tuning.jobs.create(model="tiny", training_file="file-1"),
        lambda: client.fine_tuning.jobs.cancel("ftjob-1"),
        lambda: client.models.delete("ft:tiny"),
    )


def reads(client):
    """Ask by every kind of route for what is there."""
    return (
        client.files.list,
        client.fine_tuning.jobs.list,
        client.models.list,
    )


def asking(client, model="tiny"):
    """Ask a model."""
    hello = [{"role": "user", "content": "Hello?"}]
    return (
        lambda: client.chat.completions.create(model=model, messages=hello),
        lambda: client.completions.create(model=model, prompt="Hello"),
    )


def everything(client):
    """Ask by every kind of route."""
    return (*changes(client), *reads(client), *asking(client))


def refused(ask, code):
    with pytest.raises(openai.InternalServerError) as error:
        ask()
    answer = error.value.response
    assert (answer.status_code, error.value.code) == (503, code)
    assert int(answer.headers["retry-after"]) > 0
    return error.value


def test_a_locked_database_is_told_on_every_route_that_changes_something(client, opened, http):
    with locked(opened.service.data):
        for ask in changes(client):
            refused(ask, "database_unavailable")
        assert http.get("/readyz").status_code == 503
        assert http.get("/healthz").status_code == 200
    assert uploaded(client).id in [file.id for file in client.files.list()]


def test_who_only_reads_waits_for_nobody_who_changes_something(client, opened):
    kept = uploaded(client)
    with locked(opened.service.data):
        for ask in reads(client):
            ask()
        assert [file.id for file in client.files.list()] == [kept.id]
        assert client.files.content(kept.id).read()
        for ask in asking(client, "ft:tiny:nobodys"):
            # That there is none is found out in the database.
            with pytest.raises(openai.NotFoundError):
                ask()


def test_in_a_session_that_reads_nothing_can_be_changed(client, opened):
    uploaded(client)
    with opened.service.sessions.reading() as session:
        assert session.scalar(select(File.id))
        with pytest.raises(OperationalError, match="readonly"):
            session.execute(delete(File))
    # Nor does the connection stay so for whoever has it next.
    uploaded(client)


def test_requests_that_find_all_connections_taken_are_told_when_to_come_back(client, opened, caplog):
    sessions, bind = opened.service.sessions, opened.service.sessions.kw["bind"]
    few = create_engine(bind.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    sessions.configure(bind=few)
    with few.connect():
        for ask in everything(client):
            refused(ask, "database_unavailable")
    sessions.configure(bind=bind)
    assert not list(client.files.list())
    assert opened.first_key not in caplog.text


def test_an_upload_that_the_disk_has_no_room_for_leaves_nothing(client, opened, monkeypatch):
    folder = opened.service.data / "files"
    monkeypatch.setattr(files, "new_id", lambda _kind: "file-full")
    # What is written there meets the operating system's own refusal.
    (folder / "file-full.partial").symlink_to("/dev/full")
    error = refused(lambda: uploaded(client, [ROW] * 100), "unavailable")
    assert str(opened.service.data) not in error.message
    assert not list(folder.iterdir())
    assert not list(client.files.list())
    monkeypatch.undo()
    uploaded(client)


def test_what_a_database_does_not_take_is_the_requests_fault(client, opened):
    def refuse(_connection, _cursor, statement, *_):
        if "FROM files" in statement:
            raise DataError(statement, {}, Exception("no zero bytes"))

    listen(opened.service.sessions.kw["bind"], "before_cursor_execute", refuse)
    with pytest.raises(openai.BadRequestError) as error:
        client.files.retrieve("file-none")
    assert error.value.code == "invalid_request"


class Full(SpooledTemporaryFile):
    """A temporary file on a full disk."""

    def write(self, _content):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_upload_that_finds_no_room_while_it_comes_is_no_fault_of_the_customers(client, monkeypatch):
    monkeypatch.setattr(starlette.formparsers, "SpooledTemporaryFile", Full)
    refused(lambda: uploaded(client), "unavailable")
    assert not list(client.files.list())
    monkeypatch.undo()
    kept = uploaded(client)
    assert [each.id for each in client.files.list()] == [kept.id]


def test_a_database_without_room_is_told_likewise(client, opened):
    kept, sessions, bind = uploaded(client), opened.service.sessions, opened.service.sessions.kw["bind"]
    with sessions.begin() as session:
        pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar()
    full = create_engine(bind.url)
    listen(full, "connect", lambda each, _: each.execute(f"PRAGMA max_page_count={pages}"))
    sessions.configure(bind=full)
    with pytest.raises(openai.InternalServerError) as error:
        [uploaded(client) for _ in range(50)]
    assert (error.value.status_code, error.value.code) == (503, "database_unavailable")
    sessions.configure(bind=bind)
    known = {each.id for each in client.files.list()}
    assert kept.id in known
    assert client.files.content(kept.id).read()
    uploaded(client)
