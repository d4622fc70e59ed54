"""A small suite, two tiny models to run it on, and a server that answers like OpenAI's."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


@contextmanager
def server(reply):
    """A server on this machine; `reply` takes a request and gives a status and the answer.

    The answer is its text, or a mapping with the fields of the message.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = reply(request)
            said = text if isinstance(text, dict) else {"content": text}
            message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **said}}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [message]}
            content = json.dumps(body if status == 200 else {"error": {"message": text}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
