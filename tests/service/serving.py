"""A service in a process of its own, as `deltaguard serve` runs it, that can be killed and started again."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time

import openai
import psutil

SETTINGS = """
calibrate: {num_samples: 20, num_held_out: 8}
restore: {max_safety_kl: 0.0006}
gate: {requests: 40, answer_tokens: 12}
training: {learning_rate: 0.01, lora_rank: 4}
"""

DATABASE = os.environ.get("DELTAGUARD_DATABASE")
"""URL of an empty Postgres database in which the story of a job is told, in the place of SQLite."""


class Served:
    """A service over one tiny model.

    Attributes:
        data: its folder.
        log: what it printed.
        key: its first key.
    """

    def __init__(self, root, aligned, settings=SETTINGS):
        self.data, self.log, self._aligned, self.key = root / "data", root / "log", aligned, None
        self.data.mkdir()
        database = "" if DATABASE is None else f"database_url: {DATABASE}\n"
        (self.data / "service.yaml").write_text(settings + database)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self):
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "deltaguard", "serve", "--data", str(self.data)]
        command += ["--model", f"tiny={self._aligned}", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        found = self.wait(lambda: re.search(r"dg-\S+", self.log.read_text()))
        self.key = found[0]
        self.client = openai.OpenAI(
            api_key=self.key, base_url=f"http://127.0.0.1:{self.port}/v1", max_retries=0, timeout=300
        )
        self.wait(self._answers)

    def _answers(self):
        with contextlib.suppress(openai.APIConnectionError):
            return self.client.models.list()

    def wait(self, found, seconds=600):
        """Wait for something, for as long as the service lives."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if result := found():
                return result
            time.sleep(0.1)
        raise AssertionError(f"in vain; the service said:\n{self.log.read_text()[-3000:]}")

    def kill(self):
        """Kill it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def kill_worker(self, kind):
        """Kill the process that carries out a step, once it runs."""
        folder = next(iter((self.data / "jobs").iterdir()))
        task = str(folder / f"{kind}.json")

        def worker():
            running = psutil.process_iter(["cmdline"])
            return next((each for each in running if task in (each.info["cmdline"] or ())), None)

        self.wait(worker).kill()
