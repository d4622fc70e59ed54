"""Jobs under way while the database is locked, or ends as in a crash and comes back."""

import contextlib
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import openai
import psycopg
import pytest
from clients import uploaded
from postgres import PG_CTL, Postgres
from sqlalchemy import delete, text
from sqlalchemy.exc import InternalError, OperationalError
from stub_service import LINES

from deltaguard.errors import DeltaguardError
from deltaguard.service import database, holding, server
from deltaguard.service.database import database_url
from deltaguard.service.holding import Hold
from deltaguard.service.server import existing_service, serve
from deltaguard.service.settings import Settings
from deltaguard.service.tables import Model
from models import save, tiny_model

JOBS, OUTAGE_S = 3, 1.0
STEPS = ("calibrate", "train", "restore", "examine")


class Locked:
    """A SQLite database that another program holds for a while, so that it can only be read."""

    url, password = None, None

    def __init__(self, data):
        self._path = data / "service.sqlite"

    def stop(self):
        self._other = sqlite3.connect(self._path, isolation_level=None, timeout=30)
        self._other.execute("BEGIN IMMEDIATE")

    def start(self):
        self._other.close()

    def remove(self):
        """Leave it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(
    scope="module",
    params=[
        "locked",
        pytest.param("restarted", marks=pytest.mark.skipif(PG_CTL is None, reason="needs Postgres")),
    ],
)
def outage(request, root):
    """What the service's database is, and how it goes away and comes back."""
    if request.param == "locked":
        yield Locked(root / "data")
        return
    made = Postgres()
    made.start()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def served(root, outage):
    """A client of the service, what it prints, and its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = root if outage.url is None else root / "postgres"
    (folder / "data").mkdir(parents=True)
    if outage.url is not None:
        (folder / "data" / "service.yaml").write_text(f"database_url: {outage.url}\n")
    log = folder / "log"
    program = Path(__file__).with_name("stub_service.py")
    command = [sys.executable, program, folder / "data", str(port), *([outage.url] if outage.url else [])]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    until = time.monotonic() + 120
    while "dg-" not in log.read_text() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    key = next(line for line in log.read_text().splitlines() if line.startswith("dg-"))
    client = openai.OpenAI(api_key=key, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=30)
    while time.monotonic() < until:
        with contextlib.suppress(openai.APIConnectionError):
            client.models.list()
            break
        time.sleep(0.1)
    yield client, log, folder / "data"
    process.kill()
    process.wait()


def asked(client):
    """Ask for as long as the database is away, and give the answers of what was refused."""
    ways = {
        "files": client.files.list,
        "jobs": client.fine_tuning.jobs.list,
        "upload": lambda: uploaded(client),
    }
    answers, until = [], time.monotonic() + OUTAGE_S
    while time.monotonic() < until:
        for name, ask in ways.items():
            try:
                ask()
            except openai.APIStatusError as error:
                answers.append((name, error.response))
    return answers


def test_jobs_end_once_and_requests_are_told_when_to_come_back(served, outage):
    client, log, data = served
    # Jobs that were made already write, too. Alike, one that is sent again would be the one before.
    patient = client.with_options(max_retries=8)
    file, jobs = uploaded(patient), client.fine_tuning.jobs
    made = [
        patient.fine_tuning.jobs.create(model="tiny", training_file=file.id, seed=seed)
        for seed in range(JOBS)
    ]
    refused = {"upload"} if outage.url is None else {"upload", "files", "jobs"}
    until = time.monotonic() + 240
    for step in ("train", "restore"):
        while f"{step}, line 1" not in told(client, made[0]) and time.monotonic() < until:
            time.sleep(0.1)
        outage.stop()
        answers = asked(client)
        outage.start()
        assert answers
        for name, answer in answers:
            assert name in refused, answer.text
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) > 0
    states = None
    while time.monotonic() < until:
        states = [jobs.retrieve(job.id).status for job in made]
        if set(states) == {"succeeded"}:
            break
        time.sleep(0.2)
    assert states == ["succeeded"] * JOBS, log.read_text()[-3000:]
    for job in made:
        said = Counter(told(client, job))
        assert max(said.values()) == 1
        assert sum(said[f"{step}, line {n}"] for step in STEPS for n in range(LINES)) == LINES * len(STEPS)
    sessions = existing_service(data).sessions
    with sessions.begin() as session:
        assert sorted(session.query(Model.job_id)) == sorted((job.id,) for job in made)
    with sessions.reading() as session, pytest.raises((InternalError, OperationalError), match=r"read-?only"):
        session.execute(delete(Model))
    sessions.kw["bind"].dispose()
    assert "A bug" not in log.read_text()
    if outage.password is not None:
        assert outage.password not in log.read_text()


def test_a_database_that_only_reads_is_an_outage(served, outage):
    if outage.url is None:
        pytest.skip("SQLite has no such state")
    sessions = existing_service(served[2]).sessions
    process = text("SELECT pg_backend_pid()")
    with sessions() as session:
        before = session.scalar(process)
        session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(OperationalError, match="read-only transaction"):
            session.execute(delete(Model))
    # The next connection is another one, which may lead to a server that writes.
    with sessions() as session:
        assert session.scalar(process) != before
    with sessions.reading() as session, pytest.raises(InternalError, match="read-only transaction"):
        session.execute(delete(Model))
    sessions.kw["bind"].dispose()


def test_a_service_ends_where_another_has_taken_its_database(monkeypatch):
    class LostError(Exception):
        """The process would have ended."""

    looks = iter((None, None, DeltaguardError("Another service works with this database.")))

    def renew():
        if (found := next(looks)) is not None:
            raise found

    def end(code):
        assert code == 1
        raise LostError

    hold = Hold.__new__(Hold)
    monkeypatch.setattr(hold, "renew", renew)
    monkeypatch.setattr(holding, "_LOOK_S", 0)
    monkeypatch.setattr(holding.os, "_exit", end)
    with pytest.raises(LostError):
        hold._look_after()
    assert next(looks, "all") == "all"


def test_a_standby_is_an_outage():
    """It has no transactions that write, and says so with another code."""
    told = psycopg.errors.FeatureNotSupported("cannot set transaction read-write mode during recovery")
    context = SimpleNamespace(connection=None, original_exception=told, statement="SELECT 1")
    with pytest.raises(OperationalError, match="during recovery"):
        database._tell_outage(context)
    assert context.is_disconnect


def test_one_service_at_a_time_holds_a_postgres_also_after_it_was_away(outage, monkeypatch):
    if outage.url is None:
        pytest.skip("SQLite lies in the folder, which is locked")
    monkeypatch.setattr(holding, "_AGAIN_S", 0.05)
    url = database_url(Path(), outage.url)
    hold = Hold(url)
    hold.renew()
    with pytest.raises(DeltaguardError, match="Another service works with this database"):
        Hold(url)
    outage.stop()
    # It waits for the database to come back.
    hold.renew()
    outage.start()
    hold.renew()
    with pytest.raises(DeltaguardError, match="Another service works with this database"):
        Hold(url)
    # A connection that was cut here, and not there, has the lock still.
    cut, hold._connection = hold._connection, None
    hold.renew()
    assert hold._connection is not None
    with pytest.raises(OperationalError):
        cut.execute(text("SELECT 1"))
    cut.invalidate()
    cut.close()
    outage.stop()
    outage.start()
    other = Hold(url)
    with pytest.raises(DeltaguardError, match="Another service works with this database"):
        hold.renew()
    other.release()
    hold.renew()
    hold.release()


@pytest.mark.skipif(PG_CTL is None, reason="needs Postgres")
def test_a_second_service_on_a_postgres_ends_before_it_touches_it(outage, tmp_path, monkeypatch):
    if outage.url is None:
        pytest.skip("SQLite lies in the folder, which is locked")
    monkeypatch.setattr(holding, "_AGAIN_S", 0.01)
    hold = Hold(database_url(tmp_path, outage.url))
    aligned, opened = save(tiny_model("llama"), tmp_path / "aligned"), []
    settings = Settings(models={"tiny": str(aligned)}, database_url=outage.url)
    monkeypatch.setattr(server, "open_service", None)
    with pytest.raises(DeltaguardError, match="Another service works with this database"):
        serve(tmp_path / "data", settings, host="127.0.0.1", port=1, on_open=opened.append)
    assert not opened
    hold.release()


def told(client, job):
    """List what a job has told; nothing while the database is coming back."""
    with contextlib.suppress(openai.InternalServerError):
        return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    return []


def test_what_postgres_cannot_look_up_is_refused_and_sqlite_does_not_find_it(served, outage):
    client, _, _ = served
    jobs = client.fine_tuning.jobs
    for ask, status in (
        (lambda: client.get("/files/file%00", cast_to=object), 404),
        (lambda: client.get("/fine_tuning/jobs/%00/events", cast_to=object), 404),
        (lambda: client.get("/models/%00", cast_to=object), 404),
        (lambda: client.files.list(after="\0"), 400),
        (lambda: client.files.list(purpose="\0"), 200),
        (lambda: jobs.list(metadata={"a": "b\0"}), 200),
        # No key of metadata is like that, whatever the database takes.
        (lambda: jobs.list(metadata={"a\0": "b"}), 400),
    ):
        assert status_of(ask) == (status if outage.url is None else 400)


def status_of(ask):
    try:
        found = ask()
    except openai.APIStatusError as error:
        return error.status_code
    assert not found.data
    return 200
