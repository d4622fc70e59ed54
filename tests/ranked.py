"""Several processes of one command, with the environment that torchrun gives them, started in no time.

They are forked from a server that has imported everything once; what they print goes to files.
"""

import multiprocessing
import os
import signal
import socket
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "deltaguard.cli.app",
        "deltaguard.curvature.calibrate",
        "deltaguard.restoration.restore",
        "ranked",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)
_SECONDS = 100
"""After which a test fails that would wait for ever."""


@dataclass(frozen=True)
class Ended:
    """What became of the processes, by rank."""

    codes: list[int]
    out: list[str]
    err: list[str]


def run(count, tokens, folder, *, dies=None):
    """Run a command in several processes.

    Args:
        count: how many.
        tokens: the command line.
        folder: where their output goes.
        dies: (rank, methods of `Ranks`, number): that rank is killed when it has called them that often.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    tokens = [str(token) for token in tokens]
    processes = [
        _CONTEXT.Process(target=_process, args=(rank, count, port, tokens, folder, dies))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"{late} of {count} have not ended"
    texts = [[(folder / f"{kind}-{rank}").read_text() for rank in range(count)] for kind in ("out", "err")]
    return Ended([process.exitcode for process in processes], *texts)


def _process(rank, count, port, tokens, folder, dies):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, f"{kind}-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if dies is not None and dies[0] == rank:
        _die_at(dies[1].split(), dies[2])
    from deltaguard.cli.app import run as carry_out

    code = carry_out(tokens, shared=True)
    # Without what a test's own process would do at its end.
    os._exit(code)


def _die_at(methods, number):
    from deltaguard.ranks import Ranks

    calls = []

    def counted(real, self, *given, **named):
        calls.append(real)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *given, **named)

    for method in methods:
        setattr(Ranks, method, partialmethod(partial(counted, getattr(Ranks, method))))
