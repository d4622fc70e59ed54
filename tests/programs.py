"""The command, started as a process that Ctrl-C reaches."""

import subprocess
import sys

# A process that is started in the background ignores it, and so would what that starts.
_START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from deltaguard.cli import main
main()
"""


def start(*arguments) -> subprocess.Popen:
    """`deltaguard` with these arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", _START, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
