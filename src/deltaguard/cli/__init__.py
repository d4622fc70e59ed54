"""The command line: one file per verb, and the only part of deltaguard that prints."""

import atexit
import logging
import os
import signal
import sys
from types import FrameType

from deltaguard.text import printable_lines


class _PrintableRecord(logging.LogRecord):
    """What other libraries have to say, which may quote a file."""

    def getMessage(self) -> str:  # noqa: N802  # the name that logging gives it
        """Give the message, without what a terminal would obey."""
        return printable_lines(super().getMessage())


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """End a process that is interrupted while it imports; elsewhere raise KeyboardInterrupt, as Python does.

    Libraries with native code do not survive an exception there: they abort, or import a half anew.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # Bars have hidden the cursor, and nothing that would show it again is run.
            os.write(2, (b"\x1b[?25h\r\x1b[2K" if os.isatty(2) else b"") + b"Interrupted.\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def main(*, shared: bool = False) -> None:
    """Run the `deltaguard` command.

    Args:
        shared: whether it shares its work with the processes that torchrun started beside it.
    """
    # torch reads it once: large tensors in large pages, of which fresh ones cost a half.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.setLogRecordFactory(_PrintableRecord)
    logging.captureWarnings(True)
    # A shell has background processes ignore it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        # Python takes the handler away at its end, and a late interrupt would replace the exit code.
        # What is registered first runs last: what libraries do at exit can still be interrupted.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        from deltaguard.cli.app import run

        code = run(sys.argv[1:], shared=shared)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        code = 130
    sys.exit(code)
