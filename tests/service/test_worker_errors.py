"""What a customer is told of a step that cannot be carried out."""

import json

import pytest

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import ServerAwayError
from deltaguard.finetuning.training import DivergedError, UntrainableError
from deltaguard.service import worker
from deltaguard.service.tasks import OPERATORS_BUSINESS, Calibrate, Outcome
from deltaguard.service.training_data import InvalidFileError


@pytest.mark.parametrize(
    ("error", "code", "is_told"),
    [
        (InvalidFileError("line 3: no"), "invalid_training_file", True),
        (DivergedError("Training diverged."), "calibrate_failed", True),
        (UntrainableError("There is nothing to learn from."), "calibrate_failed", True),
        (DeltaguardError("There is no space left for /srv/data."), "calibrate_failed", False),
        (ServerAwayError("Scores: 2 of 2 are missing."), "calibrate_failed", False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_is_the_customers_business_is_told(error, code, is_told, tmp_path, monkeypatch):
    def perform(*_):
        raise error

    task = Calibrate(model="m", device="cpu", options={}, restore={})
    (tmp_path / "calibrate.json").write_text(task.model_dump_json())
    monkeypatch.setattr(worker, "_perform", perform)
    worker.main(tmp_path / "calibrate.json", is_alone=True)
    outcome = Outcome(**json.loads((tmp_path / "calibrate.outcome.json").read_text()))
    assert outcome.error.code == code
    assert outcome.error.message == (str(error) if is_told else OPERATORS_BUSINESS)
    assert outcome.reason == (None if is_told else str(error))
    assert outcome.is_away == isinstance(error, ServerAwayError)
