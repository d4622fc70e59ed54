"""The program: its verbs, and what becomes of errors."""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from cyclopts import App, CycloptsError

from deltaguard import __version__
from deltaguard.cli.bench import bench
from deltaguard.cli.calibrate import calibrate
from deltaguard.cli.check import check
from deltaguard.cli.completion import completion_of
from deltaguard.cli.demo import demo
from deltaguard.cli.diff import diff
from deltaguard.cli.eval import eval as evaluate
from deltaguard.cli.gc import gc
from deltaguard.cli.info import info
from deltaguard.cli.keys import keys
from deltaguard.cli.processes import leads, processes, quiet
from deltaguard.cli.push import push
from deltaguard.cli.report import report
from deltaguard.cli.restore import restore, restore_help
from deltaguard.cli.serve import serve
from deltaguard.cli.sink import Out, UsageError, complain
from deltaguard.cli.sweep import sweep
from deltaguard.cli.verify import verify
from deltaguard.errors import CheckFailedError, DeltaguardError, is_lack_of_memory
from deltaguard.text import printable_lines

DONE, FAILED, USAGE, CHECK_FAILED, BUG, INTERRUPTED = 0, 1, 2, 3, 70, 130
_AFTER_INTERRUPT = {
    "bench": " Run the same command again to go on.",
    "calibrate": " Run the same command again with `--resume`.",
    "eval": " Run the same command again to go on.",
    "restore": " Run the same command again with `--resume`.",
    "sweep": " Run the same command again; it starts from the beginning.",
}
_SHARED = ("calibrate", "restore")
"""Verbs whose work several processes share."""

_ALONE = (
    "`deltaguard {verb}` runs in one process, and {processes} were started: start it without torchrun. "
    "Several processes share the work of `calibrate` and `restore`."
)
_TOO_LITTLE_MEMORY = (
    "There is too little memory. Close other programs, or take a smaller batch or model, or another device."
)
_REPORT = (
    "This is a bug of deltaguard, whatever the input was. Please report it, as CONTRIBUTING.md says, with "
    "what the same command prints under DELTAGUARD_DEBUG=1, and with `deltaguard info`."
)


def build_app() -> App:
    """Build the program with all its verbs."""
    app = App(
        name="deltaguard",
        help="Give a fine-tuned language model its refusals back.",
        version=__version__,
        help_format="markdown",
        console=Out(),
        error_console=Out(stderr=True),
        # `run` says how to go on.
        suppress_keyboard_interrupt=False,
    )
    for verb in (
        demo,
        calibrate,
        check,
        restore,
        sweep,
        diff,
        verify,
        evaluate,
        bench,
        serve,
        gc,
        report,
        push,
        info,
    ):
        app.command(verb, help_epilogue=restore_help() if verb is restore else None)
    app.command(keys)
    app.command(completion_of(app), name="--install-completion")
    return app


@dataclass(frozen=True)
class _End:
    """How a command ended: its exit code, and what is said of a failure."""

    code: int
    message: str = ""
    hint: str | None = None
    trace: str = ""


def run(tokens: Sequence[str], *, shared: bool = False) -> int:
    """Carry out one command line.

    Args:
        tokens: the arguments, without the program's name.
        shared: whether to do this process' part of it, where torchrun started several.

    Returns:
        The exit code: 0 done, 1 known failure, 2 usage, 3 finished but a check failed, 70 a bug of
        deltaguard, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        # What the encoding cannot hold is shown as text, not as a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if shared and processes() > 1:
        return _run_shared(tokens)
    end = _carry_out(tokens)
    _say(end)
    return end.code


def _run_shared(tokens: Sequence[str]) -> int:
    """Carry out a command line together with other processes, of which the first alone prints."""
    verb = tokens[0] if tokens else ""
    with quiet(unless=leads()) as aloud:
        if verb not in _SHARED:
            end = _End(USAGE, _ALONE.format(verb=verb, processes=processes()))
            if leads():
                _say(end)
            return end.code
        from deltaguard.ranks import joined

        try:
            with joined() as ranks:
                end = _carry_out(tokens)
                if end.message and ranks.fails_first():
                    with aloud():
                        _say(end)
        except DeltaguardError as error:
            end = _End(FAILED, str(error))
            with aloud():
                _say(end)
    return end.code


def _carry_out(tokens: Sequence[str]) -> _End:
    try:
        build_app()(list(tokens), exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, UsageError) as error:
        return _End(USAGE, str(error), "Run `deltaguard --help`, or a verb with `--help`.")
    except (DeltaguardError, OSError) as error:
        code = CHECK_FAILED if isinstance(error, CheckFailedError) else FAILED
        return _End(code, str(error), trace=traceback.format_exc())
    except KeyboardInterrupt:
        return _End(INTERRUPTED, f"Interrupted.{_AFTER_INTERRUPT.get(tokens[0] if tokens else '', '')}")
    # The last stop: so a bug is never mistaken for a known failure.
    except Exception as error:  # noqa: BLE001
        if is_lack_of_memory(error):
            return _End(FAILED, f"{_TOO_LITTLE_MEMORY} {error}".rstrip(), trace=traceback.format_exc())
        return _End(BUG, f"Unexpected {type(error).__name__}: {error}", _REPORT, traceback.format_exc())
    return _End(DONE)


def _say(end: _End) -> None:
    """Say why a command failed; where an error comes from, if that is asked for."""
    if end.trace and os.environ.get("DELTAGUARD_DEBUG") == "1":
        print(printable_lines(end.trace), end="", file=sys.stderr)  # noqa: T201
    if end.message:
        complain(end.message, hint=end.hint)
