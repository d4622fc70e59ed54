"""What the steps of a job are told, from the job as it was asked for."""

import pytest
from clients import LIMITS, ROW, uploaded

from deltaguard.service.assignments import examine_task, train_task
from deltaguard.service.settings import Settings, Training
from deltaguard.service.tables import Job


@pytest.fixture
def settings():
    rates = {"learning_rate": 1e-3, "full_learning_rate": 1e-4}
    rates |= {"dpo_learning_rate": 1e-5, "dpo_full_learning_rate": 1e-6}
    return Settings(models={"tiny": "nowhere"}, limits=LIMITS, training=Training(lora_rank=8, **rates))


def row_of(opened, job):
    with opened.service.sessions.reading() as session:
        return session.query(Job).filter_by(id=job.id).one()


@pytest.mark.parametrize(
    ("method", "weights", "rank", "rate"),
    [
        ("supervised", "lora", 8, 2e-3),
        ("supervised", "full", None, 2e-4),
        ("dpo", "lora", 8, 2e-5),
        ("dpo", "full", None, 2e-6),
    ],
)
def test_a_job_trains_the_weights_it_asks_for_at_so_many_times_their_rate(
    client, opened, method, weights, rank, rate
):
    chosen = {"learning_rate_multiplier": 2, "trained_weights": weights}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=uploaded(client).id,
        method={"type": method, method: {"hyperparameters": chosen}},
    )
    task = train_task(opened.service, row_of(opened, job))
    assert (task.method, task.lora_rank, task.learning_rate) == (method, rank, rate)


def test_a_validation_file_goes_to_the_training_and_to_the_gate(client, opened):
    files = {"training_file": uploaded(client).id}
    for validation, rows in ((None, None), (uploaded(client, [ROW, ROW]).id, 2)):
        job = row_of(
            opened, client.fine_tuning.jobs.create(model="tiny", validation_file=validation, **files)
        )
        for task in (train_task(opened.service, job), examine_task(opened.service, job)):
            assert len(task.training_file.read_text().splitlines()) == 1
            found = task.validation_file
            assert (found and len(found.read_text().splitlines())) == rows
