"""A step whose judge is away: it waits, and begins again."""

import json
from pathlib import Path

import pytest

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Missed, ServerAwayError, refuse_too_many
from deltaguard.service import process, worker
from deltaguard.service.executors.executor import Ended
from deltaguard.service.process import StoppedError, run_task
from deltaguard.service.schemas import JobError
from deltaguard.service.settings import Limits, Moderation
from deltaguard.service.tasks import OPERATORS_BUSINESS, Calibrate, Moderate, Outcome

TASK = Calibrate(model="m", device="cpu", options={}, restore={})
AWAY = Outcome(
    error=JobError(code="calibrate_failed", message=OPERATORS_BUSINESS),
    reason="the judge does not answer",
    is_away=True,
)


class Played:
    """Processes that have ended when they are looked at, and left one outcome after another."""

    places = 1

    def __init__(self, *outcomes):
        self.outcomes, self.attempts, self.happened = list(outcomes), [], []

    def begin(self, step, attempt):
        self.attempts.append(attempt)
        self.happened.append("began")
        (step.folder / f"{step.kind}.outcome.json").write_text(self.outcomes.pop(0).model_dump_json())
        return self

    def look(self):
        return Ended("done", "exit code 0")

    def leave(self):
        """Nothing goes on."""

    def stop_leftovers(self, step):
        # Before the outcome goes, so that no earlier process is taken for the next one.
        assert Path(step.folder / f"{step.kind}.outcome.json").exists()
        self.happened.append("forgot")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_LONGEST_WAIT_S", 0.01)
    told = []

    def go(executor, may_go_on=lambda: True):
        found = run_task(
            TASK, tmp_path, executor=executor, cache=tmp_path, tell=told.append, may_go_on=may_go_on
        )
        return found, told

    return go


def test_a_step_begins_again_until_the_server_is_back(run, caplog):
    executor = Played(AWAY, AWAY, Outcome(data={"passed": True}))
    found, told = run(executor)
    assert found.data == {"passed": True}
    assert executor.attempts == [1, 2, 3]
    assert executor.happened == ["began", "forgot", "began", "forgot", "began"]
    assert {each.level for each in told} == {"warn"}
    assert len({each.once for each in told}) == 1
    assert "the judge does not answer" not in told[0].message
    assert "the judge does not answer" in caplog.text


def test_a_server_that_stays_away_ends_the_step(run, monkeypatch):
    monkeypatch.setattr(process, "_LONGEST_AWAY_S", 0.3)
    monkeypatch.setattr(process, "_LONGEST_WAIT_S", 0.4)
    executor = Played(AWAY, AWAY)
    found, _ = run(executor)
    assert found == AWAY
    assert executor.attempts == [1, 2]


def test_a_step_that_waited_when_it_was_stopped_is_tried_before_anything_is_said_of_it(run, tmp_path):
    (tmp_path / "calibrate.outcome.json").write_text(AWAY.model_dump_json())
    executor = Played(Outcome())
    found, told = run(executor)
    assert found == Outcome()
    assert executor.happened == ["forgot", "began"]
    assert told == []


def test_a_job_that_is_cancelled_waits_no_longer(run, monkeypatch):
    monkeypatch.setattr(process, "_LONGEST_WAIT_S", 900)
    answers = iter([True, True, False])
    executor = Played(AWAY)
    with pytest.raises(StoppedError):
        run(executor, may_go_on=lambda: next(answers))
    assert executor.attempts == [1]


@pytest.mark.parametrize(
    ("lasting", "away", "error"),
    [(1, 4, ServerAwayError), (2, 3, DeltaguardError), (5, 0, DeltaguardError)],
)
def test_only_a_server_that_is_away_is_waited_for(lasting, away, error):
    missed = [*[Missed("status 400")] * lasting, *[Missed("status 503", is_away=True)] * away]
    with pytest.raises(DeltaguardError, match="5 of 20") as found:
        refuse_too_many(missed, 20, 0.05, whose="Scores", option="max_missing")
    assert type(found.value) is error


def test_a_steps_judge_that_nobody_serves_is_away(tmp_path):
    judge = {"kind": "llm", "base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "A drink?"}, {"role": "assistant", "content": "Tea."}]
    rows.write_text(json.dumps({"messages": turns}))
    task = Moderate(
        model="m",
        device="cpu",
        method="supervised",
        training_file=rows,
        limits=Limits(),
        moderation=Moderation(judge=judge),
    )
    (tmp_path / "moderate.json").write_text(task.model_dump_json())
    worker.main(tmp_path / "moderate.json", is_alone=True)
    outcome = Outcome.model_validate_json((tmp_path / "moderate.outcome.json").read_text())
    assert outcome.is_away
    assert "1 of 1 are missing" in outcome.reason
