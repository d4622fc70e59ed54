"""Every route of the schema, asked with another organisation's key and with names that lead elsewhere."""

import json
import re

import pytest
from clients import ODD_NAME, ROW, publish, uploaded

from deltaguard.service.tables import Job

BODIES = {
    "/v1/fine_tuning/jobs": lambda there: {"model": "tiny", "training_file": there["file_id"]},
    "/v1/chat/completions": lambda there: {
        "model": there["name"],
        "messages": [{"role": "user", "content": "Hello?"}],
    },
    "/v1/completions": lambda there: {"model": there["name"], "prompt": "Hello"},
    "/v1/operator/blocked/{job_id}/release": lambda _: {"reason": "Mine."},
    "/v1/operator/blocked/{job_id}/discard": lambda _: {"reason": "Mine."},
}
OWN = {("get", "/v1/files"), ("get", "/v1/fine_tuning/jobs"), ("get", "/v1/models"), ("post", "/v1/files")}
"""What a stranger may ask: they see, and make, what is theirs."""

OPEN = {("get", "/healthz"), ("get", "/readyz")}
LEADING = [
    "..",
    "../../etc/passwd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "file-1%00",
    'it\'s "a" 🙂',
    "*",
    "a" * 5000,
]


def operations(http):
    """List all routes that the schema has; a new one is among them."""
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        for method in methods:
            yield method, path


def asked(http, method, path, there, key):
    """Ask a route for what is there."""
    body = BODIES[path](there) if path in BODIES else None
    headers = {"Authorization": f"Bearer {key}"}
    filled = re.sub(r"\{(\w+)(:path)?\}", lambda found: there[found[1]], path)
    if (method, path) == ("post", "/v1/files"):
        sent = {"files": {"file": ("x", json.dumps(ROW))}, "data": {"purpose": "fine-tune"}}
        return http.request(method, filled, headers=headers, **sent)
    return http.request(method, filled, headers=headers, json=body)


@pytest.fixture
def there(client, opened):
    """What the first organisation has: a file, a job and its model, and a job that waits for an operator."""
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix=ODD_NAME)
    name = "ft:tiny:default::1234"
    publish(opened, job, name)
    with opened.service.sessions.begin() as session:
        session.query(Job).update({"review": "waiting"})
    return {"file_id": file.id, "job_id": job.id, "name": name}


def test_a_key_of_another_organisation_finds_nothing_on_any_route(http, stranger, there, client, opened):
    before = client.get("/fine_tuning/jobs", cast_to=object)
    found = 0
    for method, path in operations(http):
        answer = asked(http, method, path, there, stranger.api_key)
        told = f"{method} {path}: {answer.status_code} {answer.text[:300]}"
        if (method, path) in OWN:
            assert answer.status_code == 200, told
        elif path.startswith("/v1/operator") or path == "/metrics":
            assert answer.json()["error"]["code"] == "not_an_operator", told
        elif (method, path) not in OPEN:
            assert answer.status_code == 404, told
        for value in (there["job_id"], there["name"]) if answer.status_code == 200 else ():
            assert value not in answer.text, told
        found += 1
    assert found >= 20
    assert client.get("/fine_tuning/jobs", cast_to=object) == before
    assert client.files.content(there["file_id"]).read()
    assert client.models.retrieve(there["name"]).id == there["name"]
    assert opened.service.published(there["job_id"]).is_dir()


def test_without_a_key_no_route_but_those_of_health_answers(http, there):
    for method, path in operations(http):
        answer = asked(http, method, path, there, "dg-guess")
        if (method, path) not in OPEN:
            assert answer.status_code == 401, f"{method} {path}: {answer.status_code}"


@pytest.mark.parametrize("name", LEADING)
def test_ids_that_lead_elsewhere_find_nothing(http, opened, there, name):
    files = sorted(opened.service.data.rglob("*"))
    for method, path in operations(http):
        if "{" in path:
            leading = dict.fromkeys(there, name)
            answer = asked(http, method, path, leading, opened.first_key)
            # `..` is resolved by clients, and then is another route.
            told = f"{method} {path}: {answer.status_code} {answer.text[:300]}"
            allowed = (200, 400, 404, 405) if name.startswith("..") else (400, 404)
            assert answer.status_code in allowed, told
            assert answer.status_code != 200 or "root:" not in answer.text
    assert sorted(opened.service.data.rglob("*")) == files


@pytest.mark.parametrize("name", [ODD_NAME, "a\nb", 'x"; filename="y', "..", "🙂" * 600, "\u202egnp.exe"])
def test_names_of_files_and_models_stay_names(client, opened, name):
    file = uploaded(client, name=name)
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix=name[:64], metadata={"name": name[:512]}
    )
    assert client.fine_tuning.jobs.retrieve(job.id).metadata == {"name": name[:512]}
    assert [path.name for path in (opened.service.data / "files").iterdir()] == [file.id]
    assert client.files.content(file.id).response.headers["content-disposition"] == "attachment"
