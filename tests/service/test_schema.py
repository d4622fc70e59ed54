"""Requests made from the service's own OpenAPI schema: whatever comes, none meets a bug.

400 calls by default; DELTAGUARD_CALLS gives another number, as `make soak` does.
"""

import json
import os
from collections import Counter
from itertools import count

import pytest
import schemathesis
from clients import LIMITS, uploaded
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from deltaguard.service.settings import Settings

CALLS = int(os.environ.get("DELTAGUARD_CALLS", "400"))
PER_OPERATION = max(1, CALLS // 25)
"""In a round."""


@pytest.fixture
def settings_of_service():
    most = {"requests_per_minute": 10**9, "unfinished_jobs": 10**9, "all_bytes": 10**12}
    return Settings(models={"tiny": "nowhere"}, limits=LIMITS.model_copy(update=most))


@pytest.fixture(name="settings")
def _settings(settings_of_service):
    return settings_of_service


def known(client):
    """Ids of things that are there, by the names of the parameters that stand for them."""
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    return {"file_id": file.id, "job_id": job.id, "name": "tiny"}


def test_no_call_meets_a_bug(http, client, opened, begun, record_property):
    schema = schemathesis.openapi.from_asgi("/openapi.json", http.app)
    operations = [found.ok() for found in schema.get_all_operations()]
    there, statuses = known(client), Counter()
    key = {"Authorization": f"Bearer {opened.first_key}"}
    # Some operations have few requests that differ, so that there are rounds until all calls were made.
    try:
        for number in count():
            for operation in operations:
                call_at_random(operation, number, there, key, statuses)
            if sum(statuses.values()) >= CALLS:
                break
    finally:
        record_property("operations", len(operations))
        record_property("statuses", json.dumps(statuses))
    # Not all were turned away before they came to what they asked for.
    assert statuses[200] > CALLS // 20


def call_at_random(operation, number, there, key, statuses):
    """Make requests of one operation, and count the statuses of their answers."""

    @seed(number)
    @settings(
        max_examples=PER_OPERATION,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), ids=st.sampled_from(["there", "drawn"]))
    def call(case, ids):
        if ids == "there":
            case.path_parameters.update({k: v for k, v in there.items() if k in case.path_parameters})
        answer = case.call(headers=key)
        told = f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text[:300]}"
        assert answer.status_code < 500 or answer.status_code == 503, told
        assert answer.status_code != 503 or "retry-after" in answer.headers, told
        statuses[answer.status_code] += 1

    call()
