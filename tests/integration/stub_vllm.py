"""Stands in for the program `vllm`: serves the protocol, answers with the prompt, and notes what it was told.

The environment says what it does (`STUB_MODE`: serve, crash, never ready, or serve another model) and where
it notes its commands, its requests and its processes (`STUB_NOTES`).
"""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NOTES = Path(os.environ["STUB_NOTES"])
MODE = os.environ.get("STUB_MODE", "serve")
# vLLM's workers are processes, too; this one does not end when it is asked to.
WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    def send(self, body):
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        name = sys.argv[sys.argv.index("--served-model-name") + 1]
        self.send({"data": [{"id": "another" if MODE == "another" else name}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with (NOTES / "requests.jsonl").open("a") as file:
            file.write(json.dumps(request) + "\n")
        (NOTES / "key").write_text(self.headers["Authorization"] or "")
        said = request["messages"][0]["content"]
        self.send({"choices": [{"message": {"content": f" {said} "}, "finish_reason": "stop"}]})

    def log_message(self, *_):
        pass


def main():
    """Do what a mode says."""
    worker = subprocess.Popen([sys.executable, "-c", WORKER])
    told = {"argv": sys.argv[1:], "processes": [os.getpid(), worker.pid], "key": os.environ["VLLM_API_KEY"]}
    (NOTES / "told.json").write_text(json.dumps(told))
    if MODE == "crash":
        sys.exit("no memory left on the device")
    if MODE == "never ready":
        time.sleep(600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
