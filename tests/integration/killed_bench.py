"""A program that runs a bench and is killed by the system at one durable step after another.

It forks, so it must be a process of its own, in which no other thread runs yet:
`python killed_bench.py ALIGNED WORK KILLS`.
"""

import os
import signal
import sys
from pathlib import Path

# What a bench imports where it uses it is imported here, once for all forks.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import trl  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from killed_writer import kill_at

from benches import TINY
from deltaguard.studies.run import bench

METHODS = ("wise-ft", "resta", "bea")


def ran(aligned, out, step):
    """Whether a run in a process of its own came to its end and was not killed at this step."""
    child = os.fork()
    if child == 0:
        kill_at(step)
        bench(out, preset=TINY, aligned=aligned, methods=METHODS, command="test")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, f"step {step}: the run failed by itself"
    return not killed


def main():
    """Kill runs in one folder ever later, until one comes to its end; print how many were killed."""
    # A kill, unlike a power cut, loses nothing that was written.
    os.fsync = lambda descriptor: None
    aligned, work, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    assert ran(aligned, work / "whole", sys.maxsize)
    step, kills = 1, 0
    while not ran(aligned, work / "killed", step):
        kills += 1
        # Every run has what those before it finished, so the same step lies later in the work.
        step += max(1, round(8 * step / most))
    sys.stdout.write(str(kills))


if __name__ == "__main__":
    main()
