"""`deltaguard gc`: what nothing refers to goes, whatever else is going on; all else stays."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from clients import publish, uploaded

from deltaguard.cli.app import run
from deltaguard.errors import DeltaguardError
from deltaguard.service import garbage
from deltaguard.service.garbage import find_leftovers, remove_leftover
from deltaguard.service.server import open_service
from deltaguard.service.settings import Settings
from deltaguard.service.tables import Job, Owner, now

LONG_AGO = 1_000_000_000


@pytest.fixture
def jobs(client, opened):
    """A job in each state that matters, with a folder, by what becomes of it."""
    file, made = uploaded(client), {}
    ended = {"status": "failed", "finished_at": LONG_AGO}
    states = {
        "running": {"status": "running"},
        "waiting": ended | {"review": "waiting"},
        "recent": {"status": "failed", "finished_at": now()},
        "failed": ended,
        "published": {"status": "succeeded", "finished_at": LONG_AGO},
    }
    for name, state in states.items():
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        with opened.service.sessions.begin() as session:
            session.query(Job).filter_by(id=job.id).update(state)
        folder = opened.service.job(job.id)
        folder.mkdir()
        (folder / "log").write_text("x" * 100)
        made[name] = job
    return made


def places(found):
    return {each.place for each in found}


def test_only_what_nothing_needs_is_removed(client, opened, jobs):
    service = opened.service
    kept = publish(opened, jobs["published"], "ft:tiny:default::1")
    deleted = service.published("ftjob-deleted")
    deleted.mkdir()
    waiting = service.published(jobs["waiting"].id)
    waiting.mkdir()
    old, fresh = service.data / "files" / "file-old", service.data / "files" / "file-fresh.partial"
    for path in (old, fresh, old.with_suffix(".partial")):
        path.write_text("x")
    for path in (old, old.with_suffix(".partial")):
        os.utime(path, (LONG_AGO, LONG_AGO))
    (service.data / "removing").mkdir()
    (service.data / "removing" / "jobs-ftjob-gone").mkdir()
    found = find_leftovers(service, days=7)
    assert places(found) == {
        "removing/jobs-ftjob-gone",
        f"jobs/{jobs['failed'].id}",
        f"jobs/{jobs['published'].id}",
        "models/ftjob-deleted",
        "files/file-old",
        "files/file-old.partial",
    }
    assert all(remove_leftover(service, each) for each in found)
    assert not find_leftovers(service, days=7)
    assert kept.exists()
    assert waiting.exists()
    assert fresh.exists()
    assert not list((service.data / "removing").iterdir())
    for name in ("running", "waiting", "recent"):
        assert (service.job(jobs[name].id) / "log").exists()
    assert places(find_leftovers(service, days=0)) >= {f"jobs/{jobs['recent'].id}"}
    assert client.files.content(jobs["failed"].training_file).read()


def test_a_folder_in_which_a_process_works_stays(opened, jobs):
    folder = opened.service.job(jobs["failed"].id)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        removed = {
            each.place: remove_leftover(opened.service, each)
            for each in find_leftovers(opened.service, days=7)
        }
    finally:
        os.close(lock)
    assert not removed[f"jobs/{folder.name}"]
    assert (folder / "log").exists()


def test_the_command_lists_and_removes(opened, jobs, capsys):
    data, folder = str(opened.service.data), opened.service.job(jobs["failed"].id)
    assert run(["gc", "--data", data, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["leftovers"]
    assert {
        "place": f"jobs/{folder.name}",
        "why": "of a job that has ended",
        "bytes": 100,
        "removed": False,
    } in found
    assert folder.exists()
    assert run(["gc", "--data", data]) == 0
    assert "of a job that has ended" in capsys.readouterr().out
    assert not folder.exists()
    assert run(["gc", "--data", data]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert run(["gc", "--data", f"{data}-none"]) == 1


def test_what_another_user_owns_stays_and_the_rest_goes(opened, jobs, monkeypatch):
    folder, rename = opened.service.job(jobs["failed"].id), Path.rename

    def denied(path, target):
        if path == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", denied)
    found = find_leftovers(opened.service, days=7)
    removed = {each.place: remove_leftover(opened.service, each) for each in found}
    assert [place for place, is_gone in removed.items() if not is_gone] == [f"jobs/{folder.name}"]
    assert len(removed) > 1
    assert folder.exists()


def test_what_cannot_be_removed_is_not_said_to_be(opened, jobs, monkeypatch):
    folder = opened.service.job(jobs["failed"].id)
    monkeypatch.setattr(garbage.shutil, "rmtree", lambda *_, **__: None)
    removed = {
        each.place: remove_leftover(opened.service, each) for each in find_leftovers(opened.service, days=7)
    }
    assert not removed[f"jobs/{folder.name}"]


def test_beside_another_database_than_the_folders_nothing_is_garbage(opened, jobs, tmp_path, capsys):
    data = opened.service.data
    kept = opened.service.job(jobs["failed"].id)
    (data / "service.yaml").write_text(f"database_url: sqlite:///{tmp_path / 'empty.sqlite'}\n")
    for command in (["gc"], ["keys", "create", "acme"], ["keys", "list"]):
        assert run([*command, "--data", str(data)]) == 1
        capsys.readouterr()
    with pytest.raises(DeltaguardError, match="is empty, and jobs have worked in this folder"):
        open_service(data, Settings(database_url=f"sqlite:///{tmp_path / 'empty.sqlite'}"))
    other = open_service(tmp_path / "other", Settings())
    other.service.sessions.kw["bind"].dispose()
    theirs = f"sqlite:///{tmp_path / 'other' / 'service.sqlite'}"
    (data / "service.yaml").write_text(f"database_url: {theirs}\n")
    assert run(["gc", "--data", str(data)]) == 1
    assert "is of another folder's service" in capsys.readouterr().err
    assert kept.exists()


def test_a_database_that_is_nobodys_is_claimed_by_a_service_alone(opened, settings):
    def owners():
        with opened.service.sessions.reading() as session:
            return [owner.id for owner in session.query(Owner)]

    assert owners() == [opened.service.id]
    with opened.service.sessions.begin() as session:
        session.query(Owner).delete()
    assert run(["keys", "list", "--data", str(opened.service.data)]) == 0
    assert run(["gc", "--data", str(opened.service.data)]) == 0
    assert not owners()
    open_service(opened.service.data, settings).service.sessions.kw["bind"].dispose()
    assert owners() == [opened.service.id]


def test_a_folder_that_nothing_was_uploaded_to_holds_no_garbage(tmp_path, capsys):
    (tmp_path / "service").mkdir()
    data = str(tmp_path / "service")
    assert run(["gc", "--data", data]) == 1
    assert "has no key" in capsys.readouterr().err
    assert run(["keys", "create", "acme", "--data", data]) == 0
    capsys.readouterr()
    assert run(["gc", "--data", data]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_what_somebody_else_keeps_there_is_no_garbage(opened):
    folder = opened.service.data / "models" / "aligned"
    folder.mkdir(parents=True)
    assert "models/aligned" not in places(find_leftovers(opened.service, days=0))
