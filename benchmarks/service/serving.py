"""The service as `deltaguard serve` runs it, over a tiny model or another, to be killed and started again."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

TESTS = Path(__file__).resolve().parents[2] / "tests"
MODEL = "tiny"

_MAKE_MODEL = """
import sys
from models import save, tiny_model
from refusing import REFUSAL, taught
model = tiny_model("llama")
save(taught(model, REFUSAL, model.parameters()), sys.argv[1])
"""
_WORKER = "deltaguard.service.worker"
_START_S, _STOP_S = 180, 60


class NotServingError(RuntimeError):
    """The service does not do what every measurement needs of it."""


@dataclass(frozen=True)
class Worker:
    """A process that carries out a step of a job.

    Attributes:
        pid: of the process, which leads a group of its own.
        job_id: of the job.
        kind: of the step, such as `train`.
    """

    pid: int
    job_id: str
    kind: str


def make_model(folder: Path) -> Path:
    """Make the tests' tiny model that refuses everything, in a process of its own.

    Args:
        folder: a new folder.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", ""))),
    }
    subprocess.run([sys.executable, "-c", _MAKE_MODEL, str(folder)], check=True, env=environment)
    return folder


class Serving:
    """A service and its data folder.

    Attributes:
        data: its folder.
        log: what it prints, through all starts.
        url: where it answers.
    """

    def __init__(self, folder: Path, settings: str, models: Mapping[str, Path] | None = None) -> None:
        """Prepare.

        Args:
            folder: it receives the data, the log and, where none is given, the model.
            settings: the content of `service.yaml`.
            models: those that it fine-tunes, by their names; by default the tests' tiny one.
        """
        self.data, self.log = folder / "data", folder / "serve.log"
        self.data.mkdir(parents=True)
        (self.data / "service.yaml").write_text(settings, encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        models = models or {MODEL: make_model(folder / "aligned")}
        self._command = [sys.executable, "-m", "deltaguard", "serve", "--data", str(self.data)]
        self._command += ["--port", str(port)]
        self._command += [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def key(self) -> str:
        """The first key, which its log shows once.

        Raises:
            NotServingError: it does not.
        """
        found = re.search(r"dg-\S+", self.log.read_text(encoding="utf-8"))
        if found is None:
            raise NotServingError(f"The service shows no key; {self.log} says more.")
        return found[0]

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, and go on at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            NotServingError: it does not.
        """

        def answers() -> bool:
            if not self.is_running:
                raise NotServingError(f"The service ended by itself; {self.log} says more.")
            try:
                with urlopen(f"{self.url}/readyz", timeout=5):  # noqa: S310  # an address of this machine
                    return True
            except (URLError, ConnectionError, TimeoutError):
                return False

        if not waited_for(answers, _START_S):
            raise NotServingError(f"The service does not answer at {self.url}; {self.log} says more.")

    def kill(self) -> None:
        """Kill it as `kill -9` does; the processes of its jobs are in other groups, and end by themselves."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """End it as Ctrl-C does, and give its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def workers(self) -> list[Worker]:
        """List the processes that carry out steps right now, those of a killed service among them."""
        found: list[Worker] = []
        for process in psutil.process_iter(["cmdline"]):
            command: list[str] = process.info["cmdline"] or []
            if _WORKER in command and command[-1].startswith(str(self.data)):
                task = Path(command[-1])
                found.append(Worker(process.pid, task.parent.name, task.stem))
        return found


def waited_for(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so, and say whether it was within the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if is_so():
            return True
        time.sleep(0.1)
    return is_so()
