"""What a monitor reads: counts and times by route and state, for operators, and never whose."""

import openai
import pytest
from clients import uploaded


def read(http, opened):
    answer = http.get("/metrics", headers={"Authorization": f"Bearer {opened.first_key}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return dict(line.rsplit(" ", 1) for line in lines), answer.text


def test_jobs_and_requests_are_counted(http, opened, client, stranger):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    client.fine_tuning.jobs.retrieve(job.id)
    with pytest.raises(openai.NotFoundError):
        stranger.fine_tuning.jobs.retrieve(job.id)
    http.get("/v1/none/of/these")
    counts, text = read(http, opened)
    assert counts['deltaguard_jobs{state="validating_files"}'] == "1.0"
    assert counts['deltaguard_jobs{state="running"}'] == "0.0"
    assert counts['deltaguard_queue_length{queue="answers"}'] == "0.0"
    route = 'method="GET",route="/v1/fine_tuning/jobs/{job_id}"'
    assert counts[f'deltaguard_requests_total{{{route},status="200"}}'] == "1.0"
    assert counts[f'deltaguard_requests_total{{{route},status="404"}}'] == "1.0"
    assert counts[f"deltaguard_request_seconds_count{{{route}}}"] == "2.0"
    assert counts['deltaguard_requests_total{method="GET",route="none",status="404"}'] == "1.0"
    for secret in ("default", "others", job.id, opened.first_key):
        assert secret not in text


def test_strangers_read_no_metrics(http, stranger):
    assert http.get("/metrics").status_code == 401
    key = {"Authorization": f"Bearer {stranger.api_key}"}
    assert http.get("/metrics", headers=key).json()["error"]["code"] == "not_an_operator"
