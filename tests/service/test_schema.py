"""Requests made from the service's own OpenAPI schema: whatever comes, none meets a bug.

400 calls by default; DELTAGUARD_CALLS gives another number, as `make soak` does.
"""

import os

import pytest
import schemathesis
from clients import LIMITS, uploaded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deltaguard.service.settings import Settings

CALLS = int(os.environ.get("DELTAGUARD_CALLS", "400"))


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


def test_no_call_meets_a_bug(http, client, opened, begun):
    schema = schemathesis.openapi.from_asgi("/openapi.json", http.app)
    operations = [found.ok() for found in schema.get_all_operations()]
    there, statuses = known(client), {}
    key = {"Authorization": f"Bearer {opened.first_key}"}
    for operation in operations:
        taken = st.sampled_from(["there", "drawn"])

        @settings(
            max_examples=max(1, CALLS // len(operations)),
            database=None,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(), ids=taken)
        def call(case, ids):
            if ids == "there":
                case.path_parameters.update({k: v for k, v in there.items() if k in case.path_parameters})
            answer = case.call(headers=key)
            told = f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text[:300]}"
            assert answer.status_code < 500 or answer.status_code == 503, told
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

        call()
    # Not all were turned away before they came to what they asked for.
    assert statuses[200] > CALLS // 20
    assert sum(statuses.values()) >= CALLS // 2
