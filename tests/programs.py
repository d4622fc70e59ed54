"""The command, started as a process that Ctrl-C reaches."""

import subprocess
import sys

# A process that is started in the background ignores it, and so would what that starts.
_START = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from deltaguard.cli import main
begun = sys.argv.pop(1)
if begun:
    Path(begun).touch()
main()
"""


def start(*arguments, begun="") -> subprocess.Popen:
    """`deltaguard` with these arguments; the file `begun` is there once Python has come to its own code."""
    return subprocess.Popen(
        [sys.executable, "-c", _START, *map(str, (begun, *arguments))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
