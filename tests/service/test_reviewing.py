"""Models that the gate blocked: operators see why, and release or discard them."""

import openai
import pytest
from clients import client_of, uploaded

from deltaguard.service.events import tell
from deltaguard.service.keys import create_key
from deltaguard.service.tables import Job
from deltaguard.service.tasks import Outcome

BLOCKED = "/v1/operator/blocked"
CHECK = {"check": "attack_success", "passed": False, "added": {"value": 40.0}}


@pytest.fixture
def blocked(opened, http):
    """A job of a customer, as the gate leaves it."""
    with opened.service.sessions.begin() as session:
        customer = client_of(http, create_key(session, "acme"))
    job = customer.fine_tuning.jobs.create(model="tiny", training_file=uploaded(customer).id, suffix="x")
    folder = opened.service.job(job.id)
    for name in ("finetuned", "restored"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text(name)
    outcome = Outcome(data={"steps": 7, "trained_tokens": 100})
    (folder / "train.outcome.json").write_text(outcome.model_dump_json())
    with opened.service.sessions.begin() as session:
        row = session.query(Job).filter_by(id=job.id).one()
        row.status, row.review = "failed", "waiting"
        row.error = {"code": "safety_gate_attack_success", "message": "It complies.", "param": None}
        tell(session, job.id, "check attack_success", "failed", type="moderation_checks", data=CHECK)
    return customer, job, folder


def post(http, opened, job, what, **asked):
    key = {"Authorization": f"Bearer {opened.first_key}"}
    return http.post(f"{BLOCKED}/{job.id}/{what}", headers=key, json=asked)


def test_an_operator_sees_why_releases_and_the_customer_can_ask(blocked, opened, http):
    customer, job, folder = blocked
    shown = http.get(BLOCKED, headers={"Authorization": f"Bearer {opened.first_key}"}).json()["data"]
    assert [each["job"]["id"] for each in shown] == [job.id]
    assert shown[0]["checks"] == [CHECK]
    assert shown[0]["job"]["error"]["code"] == "safety_gate_attack_success"
    answer = post(http, opened, job, "release", reason="A false alarm: the requests are of chemistry.")
    assert answer.json()["status"] == "succeeded"
    done = customer.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.error, done.trained_tokens) == ("succeeded", None, 100)
    assert done.fine_tuned_model in [model.id for model in customer.models.list()]
    assert (opened.service.published(job.id) / "weights").read_text() == "restored"
    assert not (folder / "finetuned").exists()
    event = next(e for e in customer.fine_tuning.jobs.list_events(job.id) if "operator released" in e.message)
    assert event.data["by"].startswith("key-")
    assert event.data["reason"].startswith("A false alarm")
    again = post(http, opened, job, "discard", reason="Too late.")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "not_blocked")
    assert opened.service.published(job.id).exists()


def test_a_discarded_model_is_gone_and_its_job_stays_failed(blocked, opened, http):
    customer, job, folder = blocked
    assert post(http, opened, job, "discard", reason="It complies.").json()["status"] == "failed"
    assert not (folder / "finetuned").exists()
    assert not (folder / "restored").exists()
    assert not opened.service.published(job.id).exists()
    assert post(http, opened, job, "release", reason="After all.").status_code == 400
    assert customer.fine_tuning.jobs.retrieve(job.id).error.code == "safety_gate_attack_success"
    assert not http.get(BLOCKED, headers={"Authorization": f"Bearer {opened.first_key}"}).json()["data"]


def test_customers_decide_nothing_and_a_reason_is_needed(blocked, opened, http):
    customer, job, folder = blocked
    for what in ("release", "discard"):
        with pytest.raises(openai.PermissionDeniedError, match="operator's key"):
            customer.post(f"/operator/blocked/{job.id}/{what}", body={"reason": "Mine."}, cast_to=object)
        assert post(http, opened, job, what).status_code == 400
        assert post(http, opened, job, what, reason="").status_code == 400
    with pytest.raises(openai.PermissionDeniedError):
        customer.get("/operator/blocked", cast_to=object)
    other = post(http, opened, job.model_copy(update={"id": "ftjob-none"}), "release", reason="x")
    assert other.status_code == 404
    assert (folder / "restored").exists()


def test_a_job_that_failed_otherwise_is_not_released(client, http, opened):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    with opened.service.sessions.begin() as session:
        session.query(Job).update({"status": "failed"})
    assert post(http, opened, job, "release", reason="x").json()["error"]["code"] == "not_blocked"
