"""The durable workflow, with steps that need no model."""

import time

import pytest
from clients import uploaded
from dbos import DBOS
from sqlalchemy.exc import OperationalError

from deltaguard.service import workflow
from deltaguard.service.schemas import JobError
from deltaguard.service.server import open_service
from deltaguard.service.settings import Settings
from deltaguard.service.tasks import Outcome


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A service and its workflows: DBOS has one of them in a process."""
    settings = Settings(models={"tiny": "nowhere"})
    opened = open_service(tmp_path_factory.mktemp("service") / "data", settings)
    yield opened, workflow.launch(opened.service, opened.database_url)
    DBOS.destroy()


@pytest.fixture
def opened(started):
    return started[0]


@pytest.fixture
def begun(started):
    return started[1]


def ended(client, job, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = client.fine_tuning.jobs.retrieve(job.id)
        if found.status in ("succeeded", "failed", "cancelled"):
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def test_an_outage_of_the_database_ends_no_job(client, monkeypatch):
    tried = []

    def run(task, _folder, **_options):
        tried.append(task.kind)
        if tried.count("train") < 3 and task.kind == "train":
            raise OperationalError("SELECT 1", {}, Exception("gone"))
        return Outcome(error=JobError(code="enough", message="Enough.") if task.kind == "restore" else None)

    monkeypatch.setattr(workflow, "run_task", run)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    assert ended(client, job).error.code == "enough"
    assert tried == ["calibrate", "train", "train", "train", "restore"]


def test_a_bug_ends_its_job_and_no_other(client, monkeypatch):
    def run(_task, _folder, **_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(workflow, "run_task", run)
    file = uploaded(client)
    jobs = [client.fine_tuning.jobs.create(model="tiny", training_file=file.id) for _ in range(2)]
    assert [ended(client, job).error.code for job in jobs] == ["server_error"] * 2
