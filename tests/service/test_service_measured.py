"""What `benchmarks.service` looks for is found where it is, told in the table, and told by the exit code."""

import json
import sqlite3
from types import SimpleNamespace

import pytest
from benchmarks.service import __main__ as command
from benchmarks.service.ledger import Ledger
from clients import publish, uploaded
from tools.service_results import Calls, ServiceResults, service_table

from deltaguard.reports.records.base import environment
from deltaguard.service.events import tell
from deltaguard.service.tables import Event, Job

GATE = "no model is published without a passed gate"


def calls(*bugs):
    return Calls(
        environment=environment("cpu"),
        seed=0,
        calls=10_005,
        operations=25,
        statuses={200: 6005, 404: 4000},
        seconds=61.0,
        broken={"no call meets a bug": bugs},
    )


def test_what_did_not_hold_is_kept_and_ends_with_1(tmp_path, monkeypatch):
    output = tmp_path / "service.json"
    monkeypatch.setattr("sys.argv", ["service", "-o", str(output), "--parts", "calls"])
    monkeypatch.setattr(command, "measure_calls", lambda _folder, **_: calls("GET /: 500"))
    assert command.main() == 1
    assert json.loads(output.read_text())["calls"]["broken"] == {"no call meets a bug": ["GET /: 500"]}
    assert "**Not all held.** no call meets a bug: GET /: 500" in service_table(output.read_text())
    monkeypatch.setattr(command, "measure_calls", lambda _folder, **_: calls())
    assert command.main() == 0
    assert "All held: no call meets a bug." in service_table(output.read_text())


def test_what_did_not_hold_in_one_part_is_told_though_it_held_in_another():
    failed, held = calls("GET /: 500"), calls()
    clients = held.model_dump(include={"environment", "seed", "seconds", "broken"})
    content = {"clients": clients | {"clients": 2, "organisations": 1, "routes": []}}
    for first, last in ((failed, held), (held, failed)):
        content["clients"]["broken"] = first.broken
        content["calls"] = last.model_dump()
        assert "**Not all held.** no call meets a bug: GET /: 500" in service_table(json.dumps(content))


def test_the_table_has_a_row_a_part_and_a_row_a_route():
    part = {"environment": environment("cpu").model_dump(), "seed": 3, "seconds": 660.0, "broken": {"so": []}}
    kills = part | {
        "jobs": 30,
        "kills": {"server": 18, "trainer": 16, "worker": 16},
        "interrupted": {"train": 20, "examine": 10},
        "ended": {"succeeded": 18, "safety_gate_attack_success": 9, "invalid_training_file": 3},
        "published": 18,
        "answered": 18,
        "job_seconds": 40.0,
    }
    route = {"name": "GET /v1/files", "statuses": {200: 1200, 503: 3}, "p50": 0.2, "p95": 0.45, "p99": 1.5}
    clients = part | {"clients": 200, "organisations": 10, "routes": [route]}
    drawn = service_table(json.dumps({"kills": kills, "clients": clients, "calls": calls().model_dump()}))
    lines = [line for line in drawn.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert "50 (18 of a server, 16 of a trainer, 16 of a worker)" in lines[2]
    assert "30 steps were cut off and done again" in lines[2]
    assert "GET /v1/files | 1,203 | 200: 1,200, 503: 3 | 200 ms | 450 ms" in lines[3]
    assert "10,005 | 200: 6,005, 404: 4,000" in lines[4]
    assert "seed 3, 11 min" in drawn


def test_parts_that_were_not_measured_are_not_in_the_table():
    drawn = service_table(ServiceResults(calls=calls()).model_dump_json())
    assert "kill -9" not in drawn


@pytest.fixture
def books(client, opened, tmp_path):
    """What is left of one job that was published, and a look at it."""
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    publish(opened, job, "ft:tiny:default::1")
    with opened.service.sessions.begin() as session:
        session.query(Job).update({"status": "succeeded", "finished_at": 2_000_000_000})
        for once in ("started 1", "check attack_success", "check false_refusals", "published", "succeeded"):
            is_check = once.startswith("check")
            kind = "moderation_checks" if is_check else "message"
            tell(session, job.id, once, once, type=kind, data={"passed": True} if is_check else None)
        for step in (1, 2):
            told = {"step": step, "total_steps": 2}
            tell(session, job.id, f"train {step}", f"Step {step}.", type="metrics", data=told)
    workflows = sqlite3.connect(opened.service.data / "workflows.sqlite")
    workflows.execute("CREATE TABLE workflow_status (workflow_uuid, status)")
    workflows.execute("CREATE TABLE operation_outputs (workflow_uuid, function_name)")
    workflows.execute("INSERT INTO workflow_status VALUES (?, 'SUCCESS')", [f"{job.id} validate"])
    workflows.commit()
    workflows.close()
    (tmp_path / "serve.log").write_text(f"{opened.first_key}\n")
    serving = SimpleNamespace(
        data=opened.service.data, log=tmp_path / "serve.log", key=opened.first_key, workers=list
    )
    return lambda: broken(Ledger(serving, {job.id: "refusing"})), job, opened


def broken(ledger):
    return {name for name, places in ledger.broken(1).items() if places}


def test_books_in_order_hold(books):
    assert not books[0]()


def test_a_model_whose_gate_was_not_passed_is_found(books):
    look, _, opened = books
    with opened.service.sessions.begin() as session:
        session.query(Event).filter_by(once="check attack_success").update({"data": {"passed": False}})
    assert look() == {GATE}


def test_what_was_told_or_done_twice_is_found(books):
    look, job, opened = books
    with opened.service.sessions.begin() as session:
        tell(session, job.id, "published again", "published")
        for once, step in (("train 1", 1), ("train 1 again", 1)):
            tell(session, job.id, once, once, type="metrics", data={"step": step, "total_steps": 2})
    workflows = sqlite3.connect(opened.service.data / "workflows.sqlite")
    rows = [(f"{job.id} run 1", "Workflows.train")] * 2
    workflows.executemany("INSERT INTO operation_outputs VALUES (?, ?)", rows)
    workflows.commit()
    workflows.close()
    assert look() == {
        "nothing was told twice",
        "every step of training was told once",
        "every step is recorded once",
    }


def test_a_training_that_told_no_step_is_found(books):
    look, _, opened = books
    with opened.service.sessions.begin() as session:
        session.query(Event).filter_by(type="metrics").delete()
    assert look() == {"every step of training was told once"}


def test_a_job_that_did_not_end_and_a_key_in_a_log_are_found(books):
    look, _, opened = books
    with opened.service.sessions.begin() as session:
        session.query(Job).update({"status": "running"})
    (opened.service.data / "jobs" / "train.log").write_text(opened.first_key)
    assert look() >= {"every job ended, as its rows have it", "no key stands in a log"}
