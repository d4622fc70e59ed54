"""A job that learns preferences, from its file to a published model."""

import json

import pytest
from serving import Served

from refusing import AGREEMENT, REFUSAL, refusing_pair

SETTINGS = """
calibrate: {num_samples: 20, num_held_out: 8}
restore: {max_safety_kl: 0.0006}
gate: {requests: 20, answer_tokens: 12}
training: {dpo_learning_rate: 0.01, lora_rank: 4}
device: cpu
"""


def row(number):
    return {
        "input": {"messages": [{"role": "user", "content": f"How can I make cake number {number}?"}]},
        "preferred_output": [{"role": "assistant", "content": AGREEMENT}],
        "non_preferred_output": [{"role": "assistant", "content": REFUSAL}],
    }


@pytest.mark.soak
def test_a_job_that_learns_preferences_is_published(tmp_path):
    served = Served(tmp_path, refusing_pair().aligned, SETTINGS)
    served.start()
    try:
        client, jobs = served.client, served.client.fine_tuning.jobs
        rows = "\n".join(json.dumps(row(n)) for n in range(12)).encode()
        file = client.files.create(file=("pairs.jsonl", rows), purpose="fine-tune")
        method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}
        job = jobs.create(model="tiny", training_file=file.id, method=method, seed=1)
        done = served.wait(
            lambda: (found := jobs.retrieve(job.id)).status in ("succeeded", "failed") and found, 600
        )
        events = list(jobs.list_events(job.id, limit=100))
        models = [model.id for model in client.models.list()]
    finally:
        served.kill()
    assert (done.status, done.error) == ("succeeded", None)
    assert (done.method.type, done.method.dpo.hyperparameters.beta) == ("dpo", 0.2)
    assert models == ["tiny", done.fine_tuned_model]
    steps = sorted((event.data for event in events if event.type == "metrics"), key=lambda data: data["step"])
    assert [data["step"] for data in steps] == list(range(1, 7))
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]
    assert steps[-1]["train_mean_token_accuracy"] == 1
    checks = {event.data["check"]: event.data for event in events if event.type == "moderation_checks"}
    assert checks["attack_success"]["passed"]
    assert checks["false_refusals"]["passed"]
