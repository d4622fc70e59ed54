"""A step whose judge is away: it waits, and begins again."""

from pathlib import Path

import pytest

from deltaguard.evaluation.exchange import Exchange, Missed, ServerAwayError, refuse_too_many
from deltaguard.evaluation.judges.llm import LLMSpec
from deltaguard.service import process
from deltaguard.service.executors.executor import Ended
from deltaguard.service.process import StoppedError, run_task
from deltaguard.service.schemas import JobError
from deltaguard.service.tasks import OPERATORS_BUSINESS, Calibrate, Outcome

TASK = Calibrate(model="m", device="cpu", options={}, restore={})
AWAY = Outcome(
    error=JobError(code="calibrate_failed", message=OPERATORS_BUSINESS),
    reason="the judge does not answer",
    again=True,
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
    monkeypatch.setattr(process, "_WAITS_S", (0.01, 0.01))
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
    assert {(each.level, each.once) for each in told} == {("warn", "calibrate waits")}
    assert "the judge does not answer" not in told[0].message
    assert "the judge does not answer" in caplog.text


def test_a_server_that_stays_away_ends_the_step(run):
    executor = Played(AWAY, AWAY, AWAY)
    found, _ = run(executor)
    assert found == AWAY
    assert executor.attempts == [1, 2, 3]


def test_what_an_earlier_service_saw_is_waited_for_as_well(run, tmp_path):
    (tmp_path / "calibrate.outcome.json").write_text(AWAY.model_dump_json())
    executor = Played(Outcome())
    assert run(executor)[0] == Outcome()
    assert executor.happened == ["forgot", "began"]


def test_a_job_that_is_cancelled_waits_no_longer(run, monkeypatch):
    monkeypatch.setattr(process, "_WAITS_S", (1e9,))
    answers = iter([True, True, False])
    executor = Played(AWAY)
    with pytest.raises(StoppedError):
        run(executor, may_go_on=lambda: next(answers))
    assert executor.attempts == [1]


def test_waits_make_a_day():
    assert 0.95 * 86_400 < sum(process._WAITS_S) < 1.05 * 86_400


def test_only_what_may_come_later_is_waited_for():
    def refuse(*missed):
        refuse_too_many(missed, 2, 0.0, whose="Scores", option="max_missing")

    with pytest.raises(ServerAwayError):
        refuse(Missed("status 503"), Missed("no reply"))
    with pytest.raises(ValueError, match="2 of 2") as found:
        refuse(Missed("status 503"), Missed("status 401", again=False))
    assert not isinstance(found.value, ServerAwayError)
    # Of one that nobody serves, and as a step's judge sees it.
    judge = LLMSpec(base_url="http://127.0.0.1:9/v1", model="m", retries=0).make()
    with pytest.raises(ServerAwayError):
        judge.judge([Exchange("A drink?", "Tea.")])
