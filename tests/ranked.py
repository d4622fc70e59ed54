"""Several processes of one command, with the environment that torchrun gives them, started in no time.

They are forked from a server that has imported everything once; what they print goes to files.
"""

import multiprocessing
import os
import signal
import socket
import time
from contextlib import suppress
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


def run(count, tokens, folder, *, dies=None, fails=None, slow=None, at_once=None):
    """Run a command in several processes.

    Args:
        count: how many.
        tokens: the command line.
        folder: where their output goes.
        dies: (rank, methods of `Ranks`, number): that rank is killed when it has called them that often.
        fails: (rank, number): writing its tensor of that number fails; it is killed if it receives then.
        slow: a rank that writes each tensor only after another one has failed.
        at_once: how many prices a pass block by block carries, whatever memory there is.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    tokens, changed = [str(token) for token in tokens], (dies, fails, slow, at_once)
    processes = [
        _CONTEXT.Process(target=_process, args=(rank, count, port, tokens, folder, changed))
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


def _process(rank, count, port, tokens, folder, changed):
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
    _change(rank, *changed)
    from deltaguard.cli.app import run as carry_out

    code = carry_out(tokens, shared=True)
    # Without what a test's own process would do at its end.
    os._exit(code)


def _change(rank, dies, fails, slow, at_once):
    """Make of a process what a test wants, see `run`."""
    if dies is not None and dies[0] == rank:
        _die_at(dies[1].split(), dies[2])
    if fails is not None and fails[0] == rank:
        _fail_at(fails[1])
    if slow == rank:
        _take_a_while()
    if at_once is not None:
        from deltaguard.restoration.footprint import Footprint

        Footprint.at_once = at_once


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


def _fail_at(number):
    from deltaguard.models.staging import ShardWriter

    written, write = [], ShardWriter.write

    def failing(self, name, tensor):
        written.append(name)
        if len(written) == number:
            _die_at(["receive"], 1)
            raise OSError("the disk is broken")
        write(self, name, tensor)

    ShardWriter.write = failing


def _take_a_while():
    from deltaguard.models.staging import ShardWriter
    from deltaguard.ranks import Ranks

    write = ShardWriter.write

    def slowly(self, name, tensor):
        # However long another process takes to fail; it may have taken the store with it.
        store, until = vars(Ranks.current())["_store"], time.monotonic() + _SECONDS
        with suppress(RuntimeError):
            while not store.check(["deltaguard/failed"]) and time.monotonic() < until:
                time.sleep(0.05)
        write(self, name, tensor)

    ShardWriter.write = slowly
