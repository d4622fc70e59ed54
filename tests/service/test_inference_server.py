"""Answers from vLLM, by the interface that it documents: a stub of it has models, and loads adapters."""

import json
import shutil
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from clients import client_of, publish, uploaded
from starlette.testclient import TestClient

from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.service.app import make_app
from deltaguard.service.context import Caller
from deltaguard.service.errors import ApiError
from deltaguard.service.inference import Ask
from deltaguard.service.inference_server import InferenceServer
from deltaguard.service.models import Folders, find_folders
from deltaguard.service.settings import Limits
from models import save, tiny_model

HELLO = [{"role": "user", "content": "Hello?"}]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        getattr(self, self.path.rsplit("/", 1)[-1])(body)

    def completions(self, body):
        if body["model"] not in self.server.models:
            self.reply(404, {"error": {"message": "The model does not exist.", "code": 404}})
        elif "too long" in json.dumps(body):
            self.reply(400, {"error": {"message": "This model's maximum context length is 9 tokens."}})
        else:
            self.stream(body, is_chat="messages" in body)

    def stream(self, body, *, is_chat):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text, reason in (("I ", None), ("am ", None), (body["model"], "length")):
            if reason and "die" in json.dumps(body):
                return
            said = {"delta": {"content": text}} if is_chat else {"text": text}
            self.event({"choices": [{"index": 0, "finish_reason": reason, **said}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}})
        self.wfile.write(b"data: [DONE]\n\n")

    def load_lora_adapter(self, body):
        if self.server.refuses is not None:
            self.reply(400, {"error": {"message": self.server.refuses}})
            return
        self.server.models.add(body["lora_name"])
        self.reply(200, "Success: LoRA adapter added successfully.")

    def unload_lora_adapter(self, body):
        self.server.models.discard(body["lora_name"])
        self.reply(200, "Success: LoRA adapter removed successfully.")

    def event(self, content):
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def reply(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def vllm():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.models, server.refuses = [], {"nowhere"}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client_where(vllm, opened, begun):
    """Makes a client of the service where settings are others."""

    def made(**changed):
        settings = opened.service.settings.model_copy(update=changed)
        inference = InferenceServer(f"http://127.0.0.1:{vllm.server_address[1]}/v1/", most_waiting=2)
        app = make_app(replace(opened.service, settings=settings), begun, inference)
        return client_of(TestClient(app, raise_server_exceptions=False), opened.first_key)

    return made


@pytest.fixture
def client(client_where):
    return client_where()


@pytest.fixture
def tuned(client, opened):
    """A published adapter, and its name."""
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client).id)
    folder = publish(opened, job, "ft:tiny:default::1")
    (folder / "adapter_config.json").write_text("{}")
    (folder / REPORT_NAME).write_text('{"aligned": {"fingerprint": "made over"}}')
    opened.service.identities["nowhere"] = "made over"
    return folder, "ft:tiny:default::1"


@pytest.mark.parametrize(
    ("models", "why"),
    [
        ({"tiny": "others"}, "was made over another tiny than this service has now"),
        ({"large": "nowhere"}, "is over tiny, which this service has no more"),
    ],
)
def test_an_adapter_is_not_asked_over_other_weights_than_it_was_made_for(
    client_where, opened, vllm, tuned, models, why
):
    opened.service.identities["others"] = "of others"
    client = client_where(models=models)
    for ask in (
        lambda: client.chat.completions.create(model=tuned[1], messages=HELLO),
        lambda: client.completions.create(model=tuned[1], prompt="Who are you?"),
    ):
        with pytest.raises(openai.InternalServerError, match=f"{tuned[1]} {why}") as error:
            ask()
        assert (error.value.status_code, error.value.code) == (503, "base_model_missing")
        assert error.value.response.headers["retry-after"] == "60"
    assert not vllm.asked


def test_weights_that_are_replaced_while_the_service_runs_are_other_weights(
    client_where, opened, tuned, tmp_path, monkeypatch
):
    place = save(tiny_model("llama"), tmp_path / "aligned")
    client, asked = client_where(models={"tiny": str(place)}), []
    fingerprint = Checkpoint.fingerprint
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda model: asked.append(model) or fingerprint(model))
    made_over = json.dumps({"aligned": {"fingerprint": Checkpoint.open(place).fingerprint()}})
    (tuned[0] / REPORT_NAME).write_text(made_over)
    for _ in range(2):
        client.chat.completions.create(model=tuned[1], messages=HELLO)
    assert len(asked) == 2
    shutil.rmtree(place)
    save(tiny_model("llama", seed=1), place)
    with pytest.raises(openai.InternalServerError, match="over another tiny than this service has now"):
        client.chat.completions.create(model=tuned[1], messages=HELLO)


def test_a_model_of_its_own_weights_is_asked_whatever_became_of_the_one_it_was_made_from(
    client_where, opened, vllm, tuned
):
    folder, name = tuned
    (folder / "adapter_config.json").unlink()
    assert find_folders(opened.service, Caller("default", "key-0"), name) == Folders(str(folder), None)
    vllm.models.add(str(folder))
    answer = client_where(models={}).chat.completions.create(model=name, messages=HELLO)
    assert answer.choices[0].message.content == f"I am {folder}"
    assert [path for path, _ in vllm.asked] == ["/v1/chat/completions"]


def test_the_aligned_model_answers_whole_and_in_pieces(client, vllm):
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, seed=1, stop="x")
    assert whole.choices[0].message.content == "I am nowhere"
    assert (whole.choices[0].finish_reason, whole.usage.total_tokens, whole.model) == ("length", 5, "tiny")
    path, body = vllm.asked[-1]
    assert path == "/v1/chat/completions"
    # The gate asked without thoughts.
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["max_tokens"], body["seed"], body["stop"], body["messages"]) == (5, 1, ["x"], HELLO)
    pieces = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert [piece.choices[0].delta.content for piece in pieces][1:4] == ["I ", "am ", "nowhere"]
    text = client.completions.create(model="tiny", prompt="Who are you?")
    assert text.choices[0].text == "I am nowhere"
    assert vllm.asked[-1][1]["prompt"] == "Who are you?"


@pytest.mark.parametrize(("most", "of_chat", "of_text", "of_five"), [(4, 4, 4, 4), (40, 40, 16, 5)])
def test_no_answer_may_have_more_tokens_than_the_settings_say(
    client_where, vllm, most, of_chat, of_text, of_five
):
    client = client_where(limits=Limits(chat_tokens=most))
    for named in ({}, {"max_tokens": 5}, {"max_completion_tokens": 5}):
        client.chat.completions.create(model="tiny", messages=HELLO, **named)
    for named in ({}, {"max_tokens": 5}):
        client.completions.create(model="tiny", prompt=["Who are you?", "And who else?"], **named)
    found = [body["max_tokens"] for _, body in vllm.asked]
    assert found == [of_chat, of_five, of_five, of_text, of_text, of_five, of_five]


def test_an_adapter_is_loaded_when_it_is_asked_and_unloaded_when_it_is_deleted(client, vllm, tuned):
    folder, name = tuned
    for _ in range(2):
        answer = client.chat.completions.create(model=name, messages=HELLO)
        assert answer.choices[0].message.content == f"I am {folder.name}"
    loads = [body for path, body in vllm.asked if path == "/v1/load_lora_adapter"]
    assert loads == [{"lora_name": folder.name, "lora_path": str(folder)}]
    vllm.models.discard(folder.name)  # as after a restart
    assert client.chat.completions.create(model=name, messages=HELLO).choices
    client.models.delete(name)
    assert vllm.models == {"nowhere"}
    assert not folder.exists()


def test_what_the_server_refuses_or_lacks_is_told_and_when_to_come_back(client, vllm, opened, tuned, caplog):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "too long"}])
    assert error.value.code == "context_length_exceeded"
    folder, name = tuned
    (folder / "adapter_config.json").unlink()
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model=name, messages=HELLO)
    assert (error.value.status_code, error.value.code) == (503, "model_not_served")
    assert str(folder) not in error.value.message
    assert f"vllm serve {folder}" in caplog.text
    vllm.shutdown()
    vllm.server_close()
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "5")


def test_an_adapter_that_the_server_does_not_take_is_the_operators_business(client, vllm, tuned, caplog):
    folder, name = tuned
    vllm.refuses = "LoRA rank 64 is greater than max_lora_rank 16."
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model=name, messages=HELLO)
    assert (error.value.status_code, error.value.code) == (503, "model_not_served")
    assert "LoRA rank" not in error.value.message
    assert f"does not load {folder}: " in caplog.text
    assert vllm.refuses in caplog.text


def test_a_server_that_dies_in_the_midst_of_an_answer_has_not_answered(client):
    with pytest.raises(openai.InternalServerError, match="died while it answered"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "die"}])


def test_more_than_threads_are_there_for_are_refused():
    inference = InferenceServer("http://127.0.0.1:9/v1", most_waiting=0)
    with pytest.raises(ApiError, match="Too many") as refused:
        next(inference.answer(None, "acme"))
    assert refused.value.status == 503


def test_an_answer_that_nobody_reads_keeps_no_place_from_others(vllm):
    inference = InferenceServer(f"http://127.0.0.1:{vllm.server_address[1]}/v1", most_waiting=1)
    given = {"max_tokens": 9, "temperature": 0, "top_p": 1, "seed": None, "stop": ()}
    ask = Ask(model="nowhere", adapter=None, asked="x", **given)
    unread = inference.answer(ask, "acme")
    until = time.monotonic() + 30
    while inference.waiting and time.monotonic() < until:
        time.sleep(0.01)
    other = list(inference.answer(ask, "other"))
    assert [piece.text for piece in other[:-1]] == ["I ", "am ", "nowhere"]
    assert list(unread) == other
