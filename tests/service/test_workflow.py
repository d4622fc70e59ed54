"""The durable workflow, with steps that need no model."""

import base64
import errno
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import openai
import pytest
from clients import uploaded
from dbos import DBOS, SetEnqueueOptions
from dbos._sys_db import SystemDatabase
from sqlalchemy.exc import OperationalError

from deltaguard.errors import DeltaguardError
from deltaguard.service import process, taking_up, workflow
from deltaguard.service.contents import UnavailableError
from deltaguard.service.executors.local import LocalExecutor
from deltaguard.service.process import StoppedError
from deltaguard.service.schemas import JobError
from deltaguard.service.server import open_service
from deltaguard.service.settings import Moderation, Settings
from deltaguard.service.tasks import FINETUNED, METRICS, OPERATORS_BUSINESS, RESTORED, Outcome

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
AT_ONCE = 2


class Receiver(BaseHTTPRequestHandler):
    """The operator's server: answers as it was told, and else with 204."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append((headers, body))
        self.send_response(self.server.replies.pop(0) if self.server.replies else 204)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A service and its workflows: DBOS has one of them in a process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.received, server.replies = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    webhook = {"url": f"http://127.0.0.1:{server.server_port}/hook?token=hidden", "key_env": "SECRET"}
    # More than the executor has places for.
    settings = Settings(models={"tiny": "nowhere"}, webhook=webhook, jobs_at_once=AT_ONCE)
    opened = open_service(tmp_path_factory.mktemp("service") / "data", settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "_LOOK_S", 0.05)
        workflows = workflow.launch(opened.service, opened.database_url, LocalExecutor())
    yield opened, workflows, server
    DBOS.destroy()
    opened.service.sessions.kw["bind"].dispose()
    server.shutdown()
    server.server_close()


@pytest.fixture
def receiver(started):
    started[2].received.clear()
    started[2].replies.clear()
    return started[2]


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)


@pytest.fixture
def opened(started):
    return started[0]


@pytest.fixture
def begun(started):
    return started[1]


def reached(client, job, *states):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = client.fine_tuning.jobs.retrieve(job.id)
        if found.status in states:
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def ended(client, job):
    return reached(client, job, "succeeded", "failed", "cancelled")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
@pytest.mark.parametrize("is_there", [True, False], ids=["broken", "deleted"])
def test_a_file_that_cannot_be_learned_from_ends_its_job(client, opened, receiver, param, is_there):
    good, wrong = uploaded(client), uploaded(client, [{"messages": []}])
    if not is_there:
        opened.service.contents.remove(wrong.id)
    job = client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": good.id, param: wrong.id})
    error = ended(client, job).error
    assert (error.code, error.param) == (f"invalid_{param}", param)
    assert ("line 1: " if is_there else f"{wrong.id} was deleted") in error.message
    received(receiver, job, 1)


@pytest.mark.parametrize(
    "outage",
    [OperationalError("SELECT 1", {}, Exception("gone")), UnavailableError("gone")],
    ids=lambda error: type(error).__name__,
)
def test_an_outage_of_database_or_object_store_ends_no_job(outage, client, monkeypatch):
    tried = []

    def run(task, _folder, **_options):
        tried.append(task.kind)
        if tried.count("train") < 3 and task.kind == "train":
            raise outage
        return Outcome(error=JobError(code="enough", message="Enough.") if task.kind == "restore" else None)

    monkeypatch.setattr(workflow, "run_task", run)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    assert ended(client, job).error.code == "enough"
    assert tried == ["calibrate", "train", "train", "train", "restore"]


def test_rows_are_moderated_before_anything_else_where_the_operator_wants_that(
    client, opened, begun, receiver, monkeypatch
):
    judge = {"kind": "llm", "base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "JUDGES_KEY"}
    settings = opened.service.settings.model_copy(update={"moderation": Moderation(judge=judge)})
    monkeypatch.setattr(begun, "service", replace(opened.service, settings=settings))
    tried = []

    def run(task, _folder, **_options):
        tried.append(task)
        refused = JobError(code="training_rows_refused", message="1 of 1.", param="training_file")
        return Outcome(error=refused)

    monkeypatch.setattr(workflow, "run_task", run)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    assert ended(client, job).error.code == "training_rows_refused"
    (task,) = tried
    assert (task.kind, task.moderation) == ("moderate", settings.moderation)
    assert task.training_file.read_text().startswith('{"messages"')
    received(receiver, job, 1)


def test_a_bug_ends_its_job_and_no_other(client, receiver, monkeypatch):
    def run(_task, _folder, **_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(workflow, "run_task", run)
    file = uploaded(client)
    jobs = [client.fine_tuning.jobs.create(model="tiny", training_file=file.id) for _ in range(2)]
    assert [ended(client, job).error.code for job in jobs] == ["server_error"] * 2
    for job in jobs:
        received(receiver, job, 1)
        # Nothing was judged that an operator could release.
        assert job.id not in waiting(client)


def waiting(client):
    """Jobs that wait for an operator to look at what the gate blocked."""
    return [each["job"]["id"] for each in client.get("/operator/blocked", cast_to=object)["data"]]


def test_a_full_disk_ends_its_job_and_is_no_bug(client, receiver, monkeypatch, caplog):
    def full(path, _text):
        raise DeltaguardError(f"There is no space left for {path}.")

    monkeypatch.setattr(process, "write_atomically", full)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    error = ended(client, job).error
    assert error.code == "server_error"
    assert "could not go on" in error.message
    assert "no space left" not in error.message
    assert "There is no space left" in caplog.text
    assert "A bug" not in caplog.text
    received(receiver, job, 1)


def test_a_job_ends_though_its_metrics_cannot_be_kept(client, opened, receiver, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(_task, folder, **_options):
        folder.mkdir(parents=True)
        (folder / METRICS).write_text("step\n")
        raise RuntimeError("a bug")

    file = uploaded(client)
    monkeypatch.setattr(workflow, "run_task", run)
    monkeypatch.setattr(type(opened.service.contents), "put", full)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    found = ended(client, job)
    assert (found.error.code, found.result_files) == ("server_error", [])
    assert "are not kept" in caplog.text
    received(receiver, job, 1)


def test_a_model_is_published_though_its_metrics_cannot_be_kept(client, opened, receiver, monkeypatch):
    def full(*_):
        raise DeltaguardError("There is no space left.")

    def run(task, folder, **_options):
        outcome = Outcome(data={"steps": 1, "trained_tokens": 1})
        if task.kind == "train":
            (folder / RESTORED).mkdir(parents=True)
            (folder / METRICS).write_text("step\n")
            (folder / "train.outcome.json").write_text(outcome.model_dump_json())
        return outcome

    file = uploaded(client)
    monkeypatch.setattr(workflow, "run_task", run)
    monkeypatch.setattr(type(opened.service.contents), "put", full)
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file.id))
    assert job.status == "succeeded"
    assert job.result_files == []
    received(receiver, job, 1)


def test_metrics_wait_for_an_object_store_that_is_away(client, opened, receiver, monkeypatch):
    put, tried = type(opened.service.contents).put, []

    def away(contents, name, source):
        tried.append(name)
        if len(tried) < 3:
            raise UnavailableError("gone")
        return put(contents, name, source)

    def run(_task, folder, **_options):
        folder.mkdir(parents=True)
        (folder / METRICS).write_text("step\n")
        return Outcome(error=JobError(code="enough", message="Enough."))

    file = uploaded(client)
    monkeypatch.setattr(workflow, "run_task", run)
    monkeypatch.setattr(type(opened.service.contents), "put", away)
    monkeypatch.setattr("deltaguard.service.patience._AGAIN_S", 0.01)
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file.id))
    assert len(job.result_files) == 1
    received(receiver, job, 1)


def test_a_run_that_was_paused_ends_though_the_job_was_resumed(client, opened, begun, monkeypatch):
    monkeypatch.setattr(begun, "_queue", lambda *_, **__: None)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    reached(client, job, "queued")
    client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    assert not begun.start(job.id, 1)
    assert not begun.end_by_bug(job.id, 1)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    assert begun.start(job.id, 2)
    # The first run comes late, while the second is under way.
    assert not begun.start(job.id, 1)
    assert not begun.train(job.id, 1)
    assert not begun.publish(job.id, 1)
    begun.end_by_bug(job.id, 2)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "failed"


def test_what_another_version_of_the_service_left_is_begun_anew(client, opened, begun, receiver, monkeypatch):
    enough = JobError(code="enough", message="Enough.")
    monkeypatch.setattr(workflow, "run_task", lambda *_, **__: Outcome(error=enough))
    file, begin = uploaded(client), begun.begin
    with monkeypatch.context() as earlier:
        earlier.setattr(workflow, "_SAME_VERSION", "earlier")
        earlier.setattr(begun, "begin", lambda _: None)
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        # DBOS leaves alone what is not this version's to run.
        with SetEnqueueOptions(app_version="earlier"):
            begin(job.id)
    time.sleep(0.5)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
    taking_up.take_up(begun)
    assert ended(client, job).error.code == "enough"
    received(receiver, job, 1)


def test_a_job_that_was_written_and_not_queued_is_queued_within_a_minute(
    client, begun, receiver, monkeypatch
):
    class EnoughError(Exception):
        """Ends what has no end."""

    told = []

    def away(_job_id):
        raise OperationalError("INSERT", {}, Exception("gone"))

    looks, queue_all = iter(["full", None, None]), taking_up.queue_all

    def sleep(seconds):
        assert seconds == 60
        told.append(next(looks, EnoughError))
        if told[-1] is EnoughError:
            raise EnoughError

    def looked(workflows, **options):
        if told[-1] == "full":
            raise OSError(errno.ENOSPC, "the disk is full")
        queue_all(workflows, **options)

    failed = JobError(code="enough", message="Enough.")
    monkeypatch.setattr(workflow, "run_task", lambda *_, **__: Outcome(error=failed))
    file = uploaded(client)
    with monkeypatch.context() as outage:
        outage.setattr(begun, "begin", away)
        with pytest.raises(openai.InternalServerError):
            client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    (job,) = client.fine_tuning.jobs.list(limit=1).data
    assert job.status == "validating_files"
    monkeypatch.setattr(taking_up, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(taking_up, "queue_all", looked)
    with pytest.raises(EnoughError):
        taking_up.keep_queued(begun)
    # One look failed; looked for twice, and carried out once.
    assert ended(client, job).error.code == "enough"
    received(receiver, job, 1)


def test_what_is_no_business_of_the_customer_stands_in_the_log(client, receiver, monkeypatch, caplog):
    def run(task, _folder, **_options):
        failed = JobError(code="restore_failed", message=OPERATORS_BUSINESS)
        reason = "There is no space left for /srv/data."
        return Outcome(error=failed, reason=reason) if task.kind == "restore" else Outcome()

    monkeypatch.setattr(workflow, "run_task", run)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    assert ended(client, job).error.message == OPERATORS_BUSINESS
    assert f"The job {job.id} cannot go on: There is no space left for /srv/data." in caplog.text
    received(receiver, job, 1)


@pytest.mark.parametrize(("code", "is_kept"), [("train_failed", False), ("safety_gate_attack_success", True)])
def test_of_a_failed_job_nothing_large_is_kept_unless_it_may_be_released(
    client, opened, receiver, monkeypatch, code, is_kept
):
    def run(_task, folder, **_options):
        (folder / FINETUNED).mkdir(exist_ok=True, parents=True)
        return Outcome(error=JobError(code=code, message="No."))

    monkeypatch.setattr(workflow, "run_task", run)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    ended(client, job)
    name = f"{job.id} run 1, version {workflow._SAME_VERSION}"
    DBOS.retrieve_workflow(name).get_result()
    received(receiver, job, 1)
    assert (opened.service.job(job.id) / FINETUNED).exists() == is_kept


@pytest.mark.parametrize(
    ("replies", "tries"),
    [([500, 500, 204], 2), ([], 1)],
    ids=["the last of its tries", "what cannot pass is not tried again"],
)
def test_a_message_that_is_never_taken_is_given_up(
    client, opened, receiver, monkeypatch, caplog, replies, tries
):
    enough = JobError(code="enough", message="Enough.")
    monkeypatch.setattr(workflow, "run_task", lambda *_, **__: Outcome(error=enough))
    monkeypatch.setattr(workflow, "_NOTIFIED_TIMES", 2)
    receiver.replies += replies
    if not replies:
        monkeypatch.delenv("SECRET")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    last, further = (
        f"{job.id} notify failed, {n}, version {workflow._SAME_VERSION}" for n in (tries, tries + 1)
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and "was not told" not in caplog.text:
        time.sleep(0.1)
    assert f"That {job.id} has failed was not told" in caplog.text
    assert DBOS.retrieve_workflow(last).get_status().status in ("PENDING", "SUCCESS")
    assert DBOS.get_workflow_status(further) is None
    assert len(receiver.received) == len(replies[:2])


def test_what_is_said_of_a_job_that_failed_is_short(client, receiver, monkeypatch):
    long = JobError(code="invalid_training_file", message="x" * 100_000)
    monkeypatch.setattr(workflow, "run_task", lambda *_, **__: Outcome(error=long))
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    assert len(ended(client, job).error.message) <= 3000
    received(receiver, job, 1)


def received(receiver, job, count):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = [each for each in receiver.received if job.id.encode() in each[1]]
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise AssertionError(receiver.received)


def test_the_operators_server_is_told_until_it_takes_it(client, receiver, monkeypatch, caplog):
    blocked = JobError(code="safety_gate_attack_success", message="It complies.")
    monkeypatch.setattr(
        workflow,
        "run_task",
        lambda task, _folder, **_: Outcome(error=blocked if task.kind == "examine" else None),
    )
    receiver.replies += [500, 302]
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    found = received(receiver, job, 3)
    assert job.id in waiting(client)
    # As a receiver would: by the openai package, which checks the signature.
    for headers, body in found:
        event = client.webhooks.unwrap(body.decode(), headers, secret=SECRET)
        assert (event.type, event.data.id) == ("fine_tuning.job.failed", job.id)
        assert event.data.code == "safety_gate_attack_success"
    assert len({headers["webhook-id"] for headers, _ in found}) == 1
    # Each try ended by itself, and held up no other message until the next.
    for number in (1, 2):
        name = f"{job.id} notify failed, {number}, version {workflow._SAME_VERSION}"
        assert DBOS.retrieve_workflow(name).get_status().status == "SUCCESS"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.decode().replace("failed", "succeeded"), headers, secret=SECRET)
    time.sleep(0.5)
    assert len(receiver.received) == 3
    assert "hidden" not in caplog.text
    assert SECRET not in caplog.text


@pytest.fixture
def running(client, monkeypatch):
    """As many jobs as may run at a time; each trains until it is not to go on, or the test is over."""
    train, file = threading.Semaphore(0), uploaded(client)

    def run(task, _folder, *, may_go_on, **_options):
        if task.kind == "train":
            train.release()
            while may_go_on() and workflow.run_task is run:
                time.sleep(0.05)
            raise StoppedError("The job is not to go on.")
        return Outcome()

    monkeypatch.setattr(workflow, "run_task", run)
    made = [client.fine_tuning.jobs.create(model="tiny", training_file=file.id) for _ in range(AT_ONCE)]
    assert all(train.acquire(timeout=60) for _ in made)
    return made


def test_so_many_jobs_run_at_a_time_as_the_settings_say(client, receiver, running, monkeypatch):
    looks, get_queue = threading.Semaphore(0), SystemDatabase.get_queue

    def looked(system, name, **options):
        if name == workflow._TRAINING:
            looks.release()
        return get_queue(system, name, **options)

    last = client.fine_tuning.jobs.create(model="tiny", training_file=running[0].training_file)
    DBOS.retrieve_workflow(f"{last.id} validate, version {workflow._SAME_VERSION}").get_result()
    # It is in the queue: the next look takes it, if any does, and is over when another one begins.
    monkeypatch.setattr(SystemDatabase, "get_queue", looked)
    assert all(looks.acquire(timeout=60) for _ in range(2))
    name = f"{last.id} run 1, version {workflow._SAME_VERSION}"
    assert DBOS.retrieve_workflow(name).get_status().status == "ENQUEUED"
    for job in (*running, last):
        client.fine_tuning.jobs.cancel(job.id)
        received(receiver, job, 1)


def test_the_operators_server_is_told_once_of_a_cancelled_job_whether_it_ran_or_was_paused(
    client, receiver, running
):
    jobs = client.fine_tuning.jobs
    paused = jobs.create(model="tiny", training_file=running[0].training_file)
    reached(client, paused, "queued")
    jobs.pause(paused.id)
    for job in (*running, paused):
        jobs.cancel(job.id)
        ((headers, body),) = received(receiver, job, 1)
        event = client.webhooks.unwrap(body.decode(), headers, secret=SECRET)
        assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", job.id)
    time.sleep(0.4)
    assert len(receiver.received) == AT_ONCE + 1
