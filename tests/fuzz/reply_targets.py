"""What a server sends: to the engine that asks it for answers, and to the judge that asks it for scores."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mutators import damage_json

from deltaguard.evaluation.engines.openai import OpenAIEngine
from deltaguard.evaluation.exchange import Decoding, Exchange, Missed, Question
from deltaguard.evaluation.judges.llm import LLMJudge
from deltaguard.evaluation.server import Server
from targets import Kind, Target

MESSAGE = {"role": "assistant", "content": "It declines.\nScore: 1", "refusal": None}
REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}


class Sender:
    """A server on this machine that answers every request with the same bytes."""

    def __init__(self) -> None:
        self.body = b""
        sender = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sender.body)))
                self.end_headers()
                self.wfile.write(sender.body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


def reply(ask: Callable[[str], object]) -> Callable[[Path], Target]:
    def make(_: Path) -> Target:
        sender = Sender()

        def read(content: bytes) -> None:
            sender.body = content
            ask(sender.url)

        return Target(json.dumps(REPLY).encode(), damage_json, read)

    return make


def as_engine(url: str) -> None:
    engine = OpenAIEngine(Server(url, "m", retries=0))
    (answer,) = engine.answer([Question("How?", "Be kind.")], Decoding(4))
    assert isinstance(answer, str | Missed)


def as_judge(url: str) -> None:
    LLMJudge(Server(url, "m", retries=0)).judge([Exchange("How?", "So.")])


KINDS = (
    Kind("reply to an engine", 60, reply(as_engine)),
    Kind("reply to a judge", 60, reply(as_judge)),
)
