"""Processes of this machine, which end with the service."""

import contextlib
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from deltaguard.service.executors.executor import Ended, Step, describe_exit

_GRACE_S = 10
_PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH"),
    *("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"),
    # A judge may be a server elsewhere.
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What every process of a job is told: what it needs was fetched when the service started."""


class LocalExecutor:
    """Runs each process beside the service; all of them end with it, whatever killed it.

    Attributes:
        gpus: of this machine that jobs use, as CUDA_VISIBLE_DEVICES names them; each process sees one.
    """

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self.gpus = tuple(gpus)
        self._used: Counter[str] = Counter()
        self._choosing = threading.Lock()

    @property
    def places(self) -> int:
        """How many jobs are under way at a time: one for each GPU, and one where there is none."""
        return max(1, len(self.gpus))

    def begin(self, step: Step, attempt: int) -> "LocalProcess":  # noqa: ARG002  # none outlives the service
        """Begin a process; its output is appended to `KIND.log` in the job's folder."""
        command = [sys.executable, "-m", "deltaguard.service.worker", str(step.task_file)]
        keys = {name: os.environ[name] for name in step.key_names if name in os.environ}
        environment = {**known_environment(), **keys, "DELTAGUARD_CACHE": str(step.cache)}
        gpu = self._take_gpu()
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            with (step.folder / f"{step.kind}.log").open("ab") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    # Ctrl-C is for the service, which ends the process in its own way.
                    start_new_session=True,
                )
        except BaseException:
            self._give_back(gpu)
            raise
        return LocalProcess(process, on_leave=lambda: self._give_back(gpu))

    def _take_gpu(self) -> str | None:
        """Choose the GPU that the fewest processes use; None where there is none."""
        with self._choosing:
            gpu = min(self.gpus, key=self._used.__getitem__, default=None)
            if gpu is not None:
                self._used[gpu] += 1
            return gpu

    def _give_back(self, gpu: str | None) -> None:
        if gpu is not None:
            with self._choosing:
                self._used[gpu] -= 1

    def stop_leftovers(self, step: Step) -> None:
        """Do nothing: what an earlier service began ended with it."""


class LocalProcess:
    """A process of this machine that reads from a pipe of the service."""

    def __init__(self, process: subprocess.Popen[bytes], *, on_leave: Callable[[], None]) -> None:
        self._process, self._on_leave = process, on_leave

    def look(self) -> Ended | None:
        """Say how it ended; None while it goes on."""
        code = self._process.poll()
        return None if code is None else Ended("died" if code else "done", describe_exit(code))

    def stop(self) -> None:
        """End it, and wait until it is gone."""
        end_process(self._process)

    def leave(self) -> None:
        """End it: the next service could not find it."""
        end_process(self._process)
        self._on_leave()


def visible_gpus(device: str) -> list[str]:
    """List the GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them.

    Args:
        device: of the settings; `cuda:N` is one of them alone.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count()
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Those after the first that it does not know are not seen by CUDA either.
    seen = [str(n) for n in range(count)] if known is None else known.split(",")[:count]
    return [seen[int(index)]] if index else seen


def known_environment() -> dict[str, str]:
    """Choose what a process learns of the service's environment; whatever secrets it holds stay there."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | OFFLINE


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that reads from a pipe; one that does not end by itself is killed."""
    assert process.stdin is not None  # noqa: S101  # opened as a pipe
    # Of what could not be written to one that has died, the pipe still holds a part.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
