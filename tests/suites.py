"""A small suite, two tiny models to run it on, and a server that answers like OpenAI's."""

import json
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deltaguard.evaluation.journal import AnswerFile
from deltaguard.reports.records.evaluation import EVALUATION_NAME
from models import perturbed, save, tiny_model

SMALL = """
name: small
decoding: {max_new_tokens: 6}
judges:
  - kind: opening
  - kind: keywords
sections:
  - {name: attack, kind: attack, builtin: attack, count: 7, probes: [prefill, base64]}
  - {name: harmless, kind: harmless, builtin: harmless, count: 4}
  - {name: task, kind: utility, builtin: task, count: 4, scorers: [json-match], likelihood: true}
"""


def two_models(folder):
    """An aligned model and one that moved away from it."""
    model = tiny_model("llama")
    aligned = save(model, folder / "aligned")
    return [aligned, save(perturbed(model, 0.5), folder / "finetuned")]


def suite_file(folder, text=SMALL, name="suite.yaml"):
    path = folder / name
    path.write_text(text)
    return path


class Request(dict):
    """The JSON of a request, with its headers."""

    def __init__(self, body, headers):
        super().__init__(body)
        self.headers = headers


@dataclass(frozen=True)
class Raw:
    """A reply to the byte.

    Attributes:
        body: sent as it is.
        status: of HTTP.
        headers: beside or in the place of `Content-Type`, `Content-Length` and `Retry-After: 0`; None leaves
            one out.
        delay: seconds before anything is sent; they end with the server.
        drip: seconds before each byte of the body, or of `wire`.
        wire: sent in the place of all of it, whether it is HTTP or not; then the connection is cut.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str | None] = field(default_factory=dict)
    delay: float = 0
    drip: float = 0
    wire: bytes | None = None


def completion(said, **more):
    """A chat completion: what a message says, or a mapping with its fields."""
    message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
    choice = {"index": 0, "finish_reason": "stop", "message": message, **more}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return Raw(json.dumps(body).encode())


class Handler(BaseHTTPRequestHandler):
    """Sends what `server.reply` gives for a request."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = self.server.reply(Request(body, self.headers))
        if not isinstance(found, Raw):
            status, text = found
            error = Raw(json.dumps({"error": {"message": text}}).encode(), status)
            found = completion(text) if status == 200 else error
        self.server.over.wait(found.delay)
        if found.wire is not None:
            self.close_connection = True
            self.send(found.wire, found.drip)
            return
        self.send_response(found.status)
        named = {
            "Content-Type": "application/json",
            "Content-Length": str(len(found.body)),
            "Retry-After": "0",
            **found.headers,
        }
        for name, value in named.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.send(found.body, found.drip)

    def send(self, content, drip):
        size = 1 if drip else max(1, len(content))
        for start in range(0, len(content), size):
            if drip and self.server.over.wait(drip):
                return
            self.wfile.write(content[start : start + size])

    def log_message(self, *_):
        pass


class Listening(ThreadingHTTPServer):
    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.over = reply, threading.Event()

    def handle_error(self, *_):
        """Clients that go away while they are answered are what some tests are about."""


@contextmanager
def server(reply):
    """A server on this machine; `reply` takes a request and gives a `Raw`, or a status and the answer.

    The answer is its text, or a mapping with the fields of the message; with another status than 200 it is
    what the server says of the error.
    """
    listening = Listening(reply)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1"
    finally:
        listening.over.set()
        listening.shutdown()
        thread.join()
        listening.server_close()


def without_time(report):
    """A report but for when it was made and how long that took."""
    made = report.environment.model_copy(update={"created": ""})
    return report.model_copy(update={"seconds": {}, "environment": made})


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def killed_at_every_batch(run, folder, monkeypatch):
    """Check that an evaluation that is killed at a batch and run again goes on, and gives the same report.

    Args:
        run: evaluates into a folder.
        folder: for the runs' folders.
        monkeypatch: of the test.

    Returns:
        How many batches there are.
    """
    original, calls = AnswerFile.add, []

    def counted(self, indices, values):
        calls.append(len(indices))
        return original(self, indices, values)

    monkeypatch.setattr(AnswerFile, "add", counted)
    expected = run(folder / "whole")
    total = len(calls)
    for batch in range(total):
        calls.clear()
        added = 0

        def dying(self, indices, values, *, batch=batch):
            nonlocal added
            if added == batch:
                # A part of the batch is on disk, its last line cut short.
                original(self, indices[:1], values[:1])
                with self.path.open("r+b") as stream:
                    stream.truncate(self.path.stat().st_size - 5)
                raise Killed
            added += 1
            return original(self, indices, values)

        monkeypatch.setattr(AnswerFile, "add", dying)
        with pytest.raises(Killed):
            run(folder / str(batch))
        assert not (folder / str(batch) / EVALUATION_NAME).exists()
        monkeypatch.setattr(AnswerFile, "add", counted)
        assert without_time(run(folder / str(batch))) == without_time(expected)
        assert len(calls) == total - batch
    return total
