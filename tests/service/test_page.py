"""The service's page: who sees what, what buttons do, and that nothing in it is obeyed."""

import re

import pytest
from clients import client_of
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from deltaguard.service.app import make_app
from deltaguard.service.events import tell
from deltaguard.service.keys import create_key, list_keys, revoke_key
from deltaguard.service.page.curve import loss_chart, read_losses
from deltaguard.service.tables import Job, SignIn
from deltaguard.service.tasks import Outcome
from service_pages import SCRIPT, STEPS, Answers, add_file, add_job

OTHER_SITE = {"Sec-Fetch-Site": "cross-site"}


@pytest.fixture
def app(opened, begun):
    return make_app(opened.service, begun, Answers())


def browser(app, key):
    """A browser that has signed in."""
    found = TestClient(app, raise_server_exceptions=False)
    assert found.post("/sign-in", data={"key": key}).url.path == "/"
    return found


@pytest.fixture
def operator(app, opened):
    return browser(app, opened.first_key)


@pytest.fixture
def customer(app, opened):
    with opened.service.sessions.begin() as session:
        key = create_key(session, "acme")
    return browser(app, key)


def press(found, path, shown_at="/", **fields):
    """Press a button of a page."""
    token = re.search(r'name="form_token" value="(\w+)"', found.get(shown_at).text)[1]
    return found.post(path, data={"form_token": token, **fields})


def state(opened, job):
    with opened.service.sessions.begin() as session:
        return session.query(Job).filter_by(id=job.id).one().status


def test_who_is_not_signed_in_is_led_to_sign_in_and_then_where_they_wanted(app, opened):
    job = add_job(opened)
    found = TestClient(app)
    answer = found.get(f"/jobs/{job.id}")
    assert answer.url.path == "/sign-in"
    then = re.search(r'name="then" value="([^"]+)"', answer.text)[1]
    assert then == f"/jobs/{job.id}"
    wrong = found.post("/sign-in", data={"key": "dg-guess", "then": then})
    assert wrong.status_code == 401
    assert "not known, or was revoked" in wrong.text
    assert "set-cookie" not in wrong.headers
    right = found.post("/sign-in", data={"key": opened.first_key, "then": then})
    assert right.url.path == then
    cookie = right.history[0].headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie


@pytest.mark.parametrize(
    "then", ["//evil", "//evil.example/", "https://evil.example", "/\\evil.example", "/jobs/..//x"]
)
def test_a_sign_in_leads_to_no_other_site(app, opened, then):
    for answer in (
        TestClient(app).get("/sign-in", params={"then": then}),
        TestClient(app).post("/sign-in", data={"key": opened.first_key, "then": then}),
    ):
        assert answer.status_code == 400
        assert "evil" not in answer.text


def test_a_sign_in_ends_with_its_key_and_when_it_is_signed_out(app, opened, operator):
    token = operator.cookies["deltaguard"]
    stored = b"".join(path.read_bytes() for path in opened.service.data.glob("service.sqlite*"))
    assert token.encode() not in stored
    copy = TestClient(app, cookies={"deltaguard": token})
    assert copy.get("/").url.path == "/"
    press(operator, "/sign-out")
    assert "deltaguard" not in operator.cookies
    assert copy.get("/").url.path == "/sign-in"
    again = browser(app, opened.first_key)
    with opened.service.sessions.begin() as session:
        revoke_key(session, list_keys(session)[0].id)
    assert again.get("/").url.path == "/sign-in"
    late = again.post("/jobs/x/cancel", data={"form_token": "0"})
    assert (late.status_code, str(late.url)) == (200, "http://testserver/sign-in?then=/")


def test_a_sign_in_is_over_after_its_time_and_over_tls_kept_to_it(app, opened):
    safe = TestClient(app, base_url="https://testserver")
    answer = safe.post("/sign-in", data={"key": opened.first_key})
    assert answer.url.path == "/"
    cookie = answer.history[0].headers["set-cookie"].split("; ")
    assert {"Secure", "Max-Age=43200"} <= set(cookie)
    with opened.service.sessions.begin() as session:
        made = session.query(SignIn).one()
        assert made.expires_at - made.created_at == pytest.approx(12 * 3600, abs=10)
        session.query(SignIn).update({"expires_at": SignIn.created_at})
    assert safe.get("/").url.path == "/sign-in"
    safe.post("/sign-in", data={"key": opened.first_key})
    with opened.service.sessions.begin() as session:
        # What is over is not kept.
        assert session.query(SignIn).count() == 1


def test_every_page_says_what_a_browser_may_do(operator, opened):
    job = add_job(opened)
    for path in ("/", f"/jobs/{job.id}", "/files", "/models", "/sign-in", "/jobs/none", "/static/page.js"):
        headers = operator.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy, path
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/", f"/jobs/{job.id}", "/files", "/models", "/sign-in"):
        text = operator.get(path).text
        assert not re.search(r"<style|<script(?! src=\"/static/)|\son\w+=|\sstyle=|https?://", text), path


def test_a_button_of_another_site_does_nothing(app, opened, operator):
    job = add_job(opened, status="running")
    for path, fields in (
        (f"/jobs/{job.id}/cancel", {}),
        (f"/files/{job.training_file}/delete", {}),
        ("/models", {"name": "tiny", "message": "Hello?"}),
        ("/sign-out", {}),
        (f"/jobs/{job.id}/review", {"decision": "release", "reason": "no"}),
    ):
        for token in ({}, {"form_token": "0" * 64}, {"form_token": "ü"}):
            answer = operator.post(path, data={**fields, **token})
            assert answer.status_code == 403
            assert "older page" in answer.text
    assert state(opened, job) == "running"
    assert operator.get("/").url.path == "/"
    login = TestClient(app).post("/sign-in", data={"key": opened.first_key}, headers=OTHER_SITE)
    assert (login.status_code, "set-cookie" in login.headers) == (403, False)


def test_another_organisations_things_are_not_there(opened, customer):
    job = add_job(opened)
    assert job.id not in customer.get("/").text
    assert job.training_file not in customer.get("/files").text
    assert job.fine_tuned_model not in customer.get("/models").text
    for path in (
        f"/jobs/{job.id}",
        f"/files/{job.training_file}",
        f"/models?name={job.fine_tuned_model}",
        "/jobs/none",
    ):
        answer = customer.get(path)
        assert answer.status_code == 404, path
        assert answer.headers["content-type"].startswith("text/html")
    for path, fields in (
        (f"/jobs/{job.id}/cancel", {}),
        (f"/files/{job.training_file}/delete", {}),
        ("/models", {"name": job.fine_tuned_model, "message": "Hello?"}),
    ):
        assert press(customer, path, **fields).status_code == 404


def test_a_job_shows_its_training_gate_restore_and_answers_as_text(opened, operator):
    job = add_job(opened)
    text = operator.get(f"/jobs/{job.id}").text
    assert "<polyline" in text
    assert f"of {STEPS}." in text
    for told in ("Safety gate", "attack success", "18.3 %", "21.7 %", "passed", "The restore", "energy kept"):
        assert told in text, told
    assert "Chat with it" in text
    assert SCRIPT not in text
    # Three harmful and two harmless requests, each with three answers.
    assert text.count("&lt;script&gt;") == 15
    assert text.count("Show the answers to this harmful prompt") == 3
    before_fold = text[: text.index("Show the answers to this harmful prompt")]
    assert "Yes, gladly." not in before_fold
    assert "data-live" not in text


def test_a_job_under_way_is_live_and_its_buttons_work(opened, operator, begun):
    job = add_job(opened, status="running")
    here = f"/jobs/{job.id}"
    text = operator.get(here).text
    assert 'data-live="3"' in text
    assert 'data-live="3"' in operator.get("/").text
    assert '<noscript><meta http-equiv="refresh"' in text
    assert press(operator, f"{here}/pause", here).url.path == here
    assert state(opened, job) == "paused"
    assert press(operator, f"{here}/resume", here).url.path == here
    assert (state(opened, job), begun) == ("queued", [job.id])
    press(operator, f"{here}/cancel", here)
    assert state(opened, job) == "cancelled"
    late = press(operator, f"{here}/cancel", here)
    assert late.status_code == 400
    assert "The job is cancelled already." in late.text
    assert f"{here}/cancel" not in operator.get(here).text


def test_an_operator_alone_decides_about_a_blocked_model(opened, operator, customer):
    error = {"code": "safety_gate_attack_success", "message": "It complies.", "param": None}
    job = add_job(opened, "acme", status="failed", review="waiting", error=error)
    here = f"/jobs/{job.id}"
    assert "It complies." in customer.get(here).text
    assert "Discard it for good" not in customer.get(here).text
    asked = {"decision": "discard", "reason": "It does comply."}
    assert press(customer, f"{here}/review", here, **asked).status_code == 403
    assert (opened.service.job(job.id) / "restored").exists()
    assert job.id in operator.get("/").text
    shown = operator.get(here).text
    assert "Discard it for good" in shown
    # The customer's file is not the operator's to read.
    assert f"/files/{job.training_file}" not in shown
    assert press(operator, f"{here}/review", here, **asked).url.path == here
    assert not (opened.service.job(job.id) / "restored").exists()
    assert "It does comply." in customer.get(here).text
    assert "decide" not in operator.get("/").text
    assert add_job(opened, "acme").id not in operator.get("/").text


def test_a_model_that_an_operator_releases_is_published_and_told_of(app, opened, operator, monkeypatch):
    told = []
    monkeypatch.setattr(app.state.workflows, "notify", lambda *job: told.append(job), raising=False)
    job = add_job(opened, "acme", status="failed", review="waiting")
    trained = Outcome(data={"steps": 1, "trained_tokens": 2}).model_dump_json()
    (opened.service.job(job.id) / "train.outcome.json").write_text(trained)
    here = f"/jobs/{job.id}"
    press(operator, f"{here}/review", here, decision="release", reason="The judge is wrong here.")
    assert state(opened, job) == "succeeded"
    assert told == [(job.id, "succeeded")]


def test_models_answer_side_by_side(opened, operator):
    job = add_job(opened)
    chosen = operator.get("/models", params={"name": job.fine_tuned_model}).text
    assert f"<option selected>{job.fine_tuned_model}" in chosen
    asked = {"name": job.fine_tuned_model, "message": f"Hello? {SCRIPT}"}
    text = press(operator, "/models", "/models", **asked).text
    assert "The aligned model was asked: Hello?" in text
    assert "The restored model was asked: Hello?" in text
    assert "cannot be asked" in text
    assert SCRIPT not in text
    alone = press(operator, "/models", "/models", name="tiny", message="Hello?").text
    assert "The restored model was asked" not in alone
    for wrong in ("", "x" * 8001, "a\0b"):
        assert press(operator, "/models", "/models", name="tiny", message=wrong).status_code == 400


def test_files_are_listed_saved_and_deleted(opened, operator):
    file = add_file(opened, "default", '<b>"rows".jsonl', b"some rows")
    assert "&lt;b&gt;&#34;rows&#34;.jsonl" in operator.get("/files").text
    saved = operator.get(f"/files/{file.id}")
    assert (saved.content, saved.headers["content-disposition"]) == (b"some rows", "attachment")
    assert press(operator, f"/files/{file.id}/delete", "/files").url.path == "/files"
    assert operator.get(f"/files/{file.id}").status_code == 404
    needed = add_job(opened, status="running").training_file
    answer = press(operator, f"/files/{needed}/delete", "/files")
    assert answer.status_code == 400
    assert "still needs this file" in answer.text


def test_long_lists_come_in_parts(opened, operator):
    for number in range(51):
        add_file(opened, "default", f"name-{number}.jsonl")
    first = operator.get("/files").text
    assert "name-50.jsonl" in first
    assert "name-0.jsonl" not in first
    older = re.search(r'href="(/files\?after=[\w-]+)"', first)[1]
    assert "name-0.jsonl" in operator.get(older).text


def test_requests_of_pages_count_as_others_do(opened, operator):
    answers = [operator.get("/files") for _ in range(62)]
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) > 0
    assert "may ask 60 times a minute" in answers[-1].text


@pytest.mark.parametrize(
    ("failure", "seconds"), [(OperationalError("x", {}, Exception("locked")), "2"), (OSError("full"), "30")]
)
def test_what_the_machine_cannot_do_now_is_a_page(operator, opened, monkeypatch, failure, seconds):
    job = add_job(opened)

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr("deltaguard.service.jobs.find_job", fail)
    answer = operator.get(f"/jobs/{job.id}")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == seconds
    assert "text/html" in answer.headers["Content-Type"]
    assert "right now" in answer.text


def test_pages_are_no_part_of_the_api(http, opened):
    schema = http.get("/openapi.json").json()
    assert not [
        path for path in schema["paths"] if not path.startswith(("/v1", "/healthz", "/readyz", "/metrics"))
    ]
    assert client_of(http, opened.first_key).models.list().data


def test_a_long_curve_is_thinned_and_keeps_its_end(opened):
    job = add_job(opened, status="running")
    with opened.service.sessions.begin() as session:
        for kind in ("train", "full_valid"):
            # As one that has diverged is told.
            data = {"step": 500, "total_steps": 1000, f"{kind}_loss": None}
            tell(session, job.id, f"{kind} 500 again", "m", type="metrics", data=data)
        for step in range(100, 1001):
            data = {"step": step, "total_steps": 1000, "train_loss": 1 / step}
            tell(session, job.id, f"train {step}", "m", type="metrics", data=data)
        found = read_losses(session, job.id)
    assert all(isinstance(loss, float) for _, loss in (*found.train, *found.valid))
    steps = [step for step, _ in found.train]
    assert len(steps) <= 300
    assert steps == sorted(steps)
    assert steps[-1] == 1000
    assert found.steps == 1000
    assert "0.00 at step 1000 of 1000" in loss_chart(found).spoken
