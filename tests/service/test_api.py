"""The service's HTTP, driven by the unmodified openai package, without any training."""

import io
import json

import openai
import pytest
from clients import LIMITS, ODD_NAME, ROW, client_of, publish, uploaded
from openai.types import FileObject, Model
from openai.types.chat import ChatCompletionMessage
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from sqlalchemy import text

from deltaguard.cli.app import run
from deltaguard.service.events import tell
from deltaguard.service.keys import list_keys, revoke_key
from deltaguard.service.server import open_service
from deltaguard.service.tables import Job


def test_files_come_back_as_they_were_whatever_their_name(client, opened):
    content = "\n".join(map(json.dumps, [ROW])).encode()
    file = uploaded(client)
    FileObject.model_validate(file.model_dump(), strict=True)
    # How the package writes a quote into a form.
    assert (file.filename.replace("%22", '"'), file.bytes, file.purpose) == (
        ODD_NAME,
        len(content),
        "fine-tune",
    )
    assert client.files.content(file.id).read() == content
    assert [path.name for path in (opened.service.data / "files").iterdir()] == [file.id]
    assert client.files.retrieve(file.id) == file
    assert [each.id for each in client.files.list()] == [file.id]
    assert client.files.delete(file.id).deleted
    assert not list((opened.service.data / "files").iterdir())
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_uploads_that_are_too_large_or_none_are_refused(client, http, opened):
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("x", b"x" * 200_000), purpose="fine-tune")
    assert (error.value.status_code, error.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("x", b"x" * 50_001), purpose="fine-tune")
    assert (error.value.status_code, error.value.code) == (413, "file_too_large")
    with pytest.raises(openai.BadRequestError, match=r"expires_after\[anchor\] is not known here") as error:
        client.files.create(
            file=("rows.jsonl", b"{}"),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 86_400},
        )
    assert error.value.param == "expires_after[anchor]"
    with pytest.raises(openai.BadRequestError, match="The file is empty"):
        client.files.create(file=("x", b""), purpose="fine-tune")
    # Refused by what it announces, before any of it is read.
    headers = {"Authorization": f"Bearer {opened.first_key}", "Content-Length": str(1 << 30)}
    assert http.post("/v1/files", headers=headers, content=b"x").status_code == 413

    def endless():
        for _ in range(200):
            yield b"x" * 1000

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    key = {"Authorization": f"Bearer {opened.first_key}"}
    assert http.post("/v1/files", headers=key | kind, content=endless()).status_code in (400, 413)
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(file=("x", b"{}"), purpose="batch")
    assert error.value.param == "purpose"
    assert not list((opened.service.data / "files").iterdir())


def test_a_job_is_made_with_numbers_in_the_place_of_auto(client, begun):
    file, validation = uploaded(client), uploaded(client)
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        validation_file=validation.id,
        suffix="mine",
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )
    FineTuningJob.model_validate(job.model_dump(), strict=True)
    assert job.status == "validating_files"
    assert (job.training_file, job.validation_file) == (file.id, validation.id)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert begun == [job.id]
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    event = client.fine_tuning.jobs.list_events(job.id).data[0]
    FineTuningJobEvent.model_validate(event.model_dump(), strict=True)
    assert event.message == "Created fine-tuning job."
    for needed in (file, validation):
        with pytest.raises(openai.BadRequestError, match="still needs this file"):
            client.files.delete(needed.id)


@pytest.mark.parametrize(
    ("changed", "status", "param"),
    [
        ({"model": "gpt-5"}, 400, "model"),
        ({"training_file": "file-none"}, 404, "file"),
        ({"validation_file": "file-none"}, 404, "file"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type"),
        ({"method": {"type": "dpo", "supervised": {"hyperparameters": {}}}}, 400, "method"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, 400, None),
        ({"seed": -1}, 400, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, None),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "integrations"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, 400, "metadata"),
        ({"extra_body": {"chat_template": "{{ evil }}"}}, 400, "chat_template"),
    ],
)
def test_what_a_job_cannot_be_is_told_in_openais_envelope(client, begun, changed, status, param):
    asked = {"model": "tiny", "training_file": uploaded(client).id} | changed
    with pytest.raises(openai.APIStatusError) as error:
        client.fine_tuning.jobs.create(**asked)
    assert error.value.status_code == status
    assert set(error.value.body) == {"message", "type", "param", "code"}
    assert param is None or error.value.param == param
    assert not begun


def test_a_job_learns_preferences_with_beta(client):
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id, method=method)
    FineTuningJob.model_validate(job.model_dump(), strict=True)
    assert job.method.type == "dpo"
    assert (job.method.dpo.hyperparameters.beta, job.method.dpo.hyperparameters.batch_size) == (0.3, 4)
    assert client.fine_tuning.jobs.retrieve(job.id).method == job.method
    automatic = client.fine_tuning.jobs.create(
        model="tiny", training_file=job.training_file, method={"type": "dpo"}
    )
    assert automatic.method.dpo.hyperparameters.beta == 0.1


def test_a_request_that_a_client_repeats_makes_one_job(client, begun):
    asked = {"model": "tiny", "training_file": uploaded(client).id}
    first = client.fine_tuning.jobs.create(**asked)
    again = client.fine_tuning.jobs.create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == first.id
    other = client.fine_tuning.jobs.create(**asked)
    assert other.id != first.id
    key = {"Idempotency-Key": "one"}
    keyed = client.fine_tuning.jobs.create(**asked, extra_headers=key)
    assert client.fine_tuning.jobs.create(**asked, extra_headers=key).id == keyed.id
    # A job that exists is begun again, which changes nothing where it was begun before.
    assert list(dict.fromkeys(begun)) == [first.id, other.id, keyed.id]
    with pytest.raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(**asked, seed=5, extra_headers=key)
    assert error.value.code == "idempotency_key_reused"


def test_lists_come_in_parts_and_can_be_filtered(client, opened):
    file = uploaded(client)
    made = [
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id, metadata={"n": str(n)})
        for n in range(3)
    ]
    ids = [job.id for job in reversed(made)]
    first = client.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in first.data], first.has_more) == (ids[:2], True)
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == ids
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[1].id]
    with opened.service.sessions.begin() as session:
        for n in range(30):
            tell(session, made[0].id, f"e{n}", f"number {n}")
            tell(session, made[0].id, f"e{n}", "told twice")
    said = [event.message for event in client.fine_tuning.jobs.list_events(made[0].id, limit=7)]
    assert said == [f"number {n}" for n in reversed(range(30))] + ["Created fine-tuning job."]
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list(after="ftjob-none")


def test_jobs_without_metadata_can_be_listed(client):
    file = uploaded(client)
    client.fine_tuning.jobs.create(model="tiny", training_file=file.id, metadata={"n": "1"})
    plain = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [plain.id]
    with pytest.raises(openai.BadRequestError, match="metadata is null, or asked for by its keys"):
        client.fine_tuning.jobs.list(extra_query={"metadata": "none"})


@pytest.mark.parametrize("key", ['a"b', "a\\b", "a\nb", ""])
def test_a_key_of_metadata_that_nobody_could_look_up_is_refused(key, client):
    file = uploaded(client)
    with pytest.raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id, metadata={key: "x"})
    assert "metadata" in error.value.param
    with pytest.raises(openai.BadRequestError, match="Keys of metadata"):
        client.fine_tuning.jobs.list(metadata={key: "x"})


def test_jobs_are_cancelled_paused_and_resumed(client, opened, begun):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    with pytest.raises(openai.BadRequestError, match="validating_files"):
        client.fine_tuning.jobs.pause(job.id)
    with opened.service.sessions.begin() as session:
        session.query(Job).update({"status": "running"})
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert begun == [job.id, job.id]
    # A client whose first try failed after the row was written sends it again.
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert begun == [job.id] * 3
    resumed = [e for e in client.fine_tuning.jobs.list_events(job.id) if e.message == "The job was resumed."]
    assert len(resumed) == 1
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at
    with pytest.raises(openai.BadRequestError, match="cancelled already"):
        client.fine_tuning.jobs.cancel(job.id)


def test_an_upload_is_one_request(client, opened):
    uploaded(client)
    assert [len(asked) for asked in opened.service.asked.values()] == [1]


def test_too_many_jobs_and_requests_are_told_when_to_come_back(client, opened):
    file = uploaded(client)
    for _ in range(LIMITS.unfinished_jobs):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    with pytest.raises(openai.RateLimitError) as error:
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert (error.value.code, error.value.response.headers["retry-after"]) == ("too_many_jobs", "60")
    # A repetition would be given the last of these jobs.
    assert error.value.response.headers["x-should-retry"] == "false"
    for _ in range(LIMITS.requests_per_minute - LIMITS.unfinished_jobs - 2):
        client.models.list()
    with pytest.raises(openai.RateLimitError) as error:
        client.models.list()
    assert 0 < int(error.value.response.headers["retry-after"]) <= 61
    assert "x-should-retry" not in error.value.response.headers
    with pytest.raises(openai.RateLimitError) as error:
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert error.value.code == "rate_limit_exceeded"
    assert error.value.response.headers["x-should-retry"] == "false"


def test_models_are_listed_and_deleted(client, stranger, opened):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    name = "ft:org/other:default:x:1234"
    folder = publish(opened, job, name)
    assert [model.id for model in client.models.list()] == ["tiny", "org/other", name]
    Model.model_validate(client.models.retrieve(name).model_dump(), strict=True)
    assert client.models.retrieve("org/other").owned_by == "operator"
    assert [model.id for model in stranger.models.list()] == ["tiny", "org/other"]
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert (checkpoint.fine_tuned_model_checkpoint, checkpoint.step_number) == (name, 3)
    assert checkpoint.metrics.full_valid_loss is None
    losses = {"aligned": 3.0, "finetuned": 1.0, "restored": 2.0}
    with opened.service.sessions.begin() as session:
        tell(session, job.id, "check validation_loss", "told", data={"losses": losses})
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert (checkpoint.metrics.step, checkpoint.metrics.full_valid_loss) == (3, 2.0)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")
    assert client.models.delete(name).deleted
    assert not folder.exists()


def test_another_organisations_things_are_not_there(client, stranger, opened):
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    name = "ft:tiny:default::1234"
    publish(opened, job, name)
    jobs = stranger.fine_tuning.jobs
    hello = [{"role": "user", "content": "Hello?"}]
    for ask in (
        lambda: stranger.files.retrieve(file.id),
        lambda: stranger.files.content(file.id),
        lambda: stranger.files.delete(file.id),
        lambda: jobs.retrieve(job.id),
        lambda: jobs.cancel(job.id),
        lambda: jobs.pause(job.id),
        lambda: jobs.resume(job.id),
        lambda: jobs.list_events(job.id),
        lambda: jobs.checkpoints.list(job.id),
        lambda: jobs.create(model="tiny", training_file=file.id),
        lambda: stranger.models.retrieve(name),
        lambda: stranger.models.delete(name),
        lambda: stranger.chat.completions.create(model=name, messages=hello),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert not list(stranger.files.list())
    assert not list(jobs.list())


def test_only_hashes_of_keys_are_stored_and_revoked_ones_are_not_taken(http, opened):
    data = opened.service.data
    stored = b"".join(path.read_bytes() for path in data.glob("service.sqlite*"))
    assert opened.first_key.encode() not in stored
    assert open_service(data, opened.service.settings).first_key is None
    client = client_of(http, opened.first_key)
    client.models.list()
    with opened.service.sessions.begin() as session:
        revoke_key(session, list_keys(session)[0].id)
    for key in (opened.first_key, "dg-guess"):
        with pytest.raises(openai.AuthenticationError) as error:
            client_of(http, key).models.list()
        assert error.value.code == "invalid_api_key"
        assert key not in str(error.value)
    assert http.get("/v1/models").json()["error"]["code"] == "missing_api_key"


def test_what_is_no_route_or_no_json_is_told_likewise(http, opened):
    key = {"Authorization": f"Bearer {opened.first_key}"}
    assert http.get("/v1/none", headers=key).json()["error"]["type"] == "invalid_request_error"
    assert http.put("/v1/files", headers=key).status_code == 405
    answer = http.post("/v1/fine_tuning/jobs", headers=key, content=io.BytesIO(b"{").read())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}


def test_keys_of_the_command_line_open_what_they_say_until_they_are_revoked(http, opened, capsys):
    def made(*options):
        assert run(["keys", *options, "--data", str(opened.service.data), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def status(key):
        return http.get("/v1/operator/blocked", headers={"Authorization": f"Bearer {key}"}).status_code

    customer, operator = made("create", "acme")["key"], made("create", "acme", "--operator")["key"]
    assert (status(customer), status(operator)) == (403, 200)
    known = {each["ends_with"]: each["id"] for each in made("list")["keys"]}
    (found,) = [known[end] for end in known if operator.endswith(end)]
    made("revoke", found)
    assert (status(customer), status(operator)) == (403, 401)


@pytest.mark.parametrize("path", ["/sign-in", "/v1/files"])
@pytest.mark.parametrize("charset", ["punycode", "UTF-8"])
def test_no_form_is_decoded_by_a_codec_of_the_senders_choice(http, opened, path, charset):
    body = b'--x\r\nContent-Disposition: form-data; name="key"\r\n\r\n' + b"a" * 1000 + b"\r\n--x--\r\n"
    headers = {
        "Content-Type": f"multipart/form-data; boundary=x; charset={charset}",
        "Authorization": f"Bearer {opened.first_key}",
    }
    answer = http.post(path, content=body, headers=headers)
    assert ("UTF-8 alone" in answer.text) == (charset == "punycode")
    assert answer.status_code == 400


def test_what_the_service_answered_may_be_said_again(client):
    said = ChatCompletionMessage(role="assistant", content="Hi.", refusal=None)
    messages = [{"role": "user", "content": "Hello?"}, said, {"role": "user", "content": "And?"}]
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="nobody", messages=messages)
    assert error.value.code == "model_not_found"


def test_few_values_of_metadata_are_looked_for_at_a_time(http, opened):
    asked = "&".join(f"metadata[a]={i}" for i in range(17))
    headers = {"Authorization": f"Bearer {opened.first_key}"}
    answer = http.get(f"/v1/fine_tuning/jobs?{asked}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


def test_many_problems_of_a_request_are_told_in_part(http, opened):
    headers = {"Authorization": f"Bearer {opened.first_key}"}
    answer = http.post("/v1/fine_tuning/jobs", headers=headers, json={f"x{i}": 1 for i in range(5000)})
    assert answer.status_code == 400
    assert len(answer.content) < 5000


def test_a_name_is_cut_after_what_stands_for_zero_bytes(http, opened):
    headers = {"Authorization": f"Bearer {opened.first_key}"}
    body = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="\0'
        + b"n" * 600
        + b'"\r\n\r\n{}\r\n--x--\r\n'
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = http.post("/v1/files", headers=headers | kind, content=body)
    assert answer.status_code == 200
    name = answer.json()["filename"]
    assert name.startswith("\\x00n")
    assert len(name) <= 512


def test_who_signs_in_is_counted(http, opened):
    codes = [
        http.post("/sign-in", data={"key": opened.first_key}, follow_redirects=False).status_code
        for _ in range(LIMITS.requests_per_minute + 1)
    ]
    assert set(codes[:-1]) == {303}
    assert codes[-1] == 429


def test_metadata_are_kept_as_they_are_read(client, opened):
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, metadata={"équipe": "à"})
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"équipe": "à"})] == [job.id]
    with opened.service.sessions.reading() as session:
        # SQLite before 3.45 finds no key that is escaped.
        assert session.scalar(text("SELECT user_metadata FROM jobs")) == '{"équipe": "à"}'
