"""The program: its verbs, and what becomes of errors."""

import io
import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from deltaguard import __version__
from deltaguard.cli.bench import bench
from deltaguard.cli.calibrate import calibrate
from deltaguard.cli.check import check
from deltaguard.cli.demo import demo
from deltaguard.cli.diff import diff
from deltaguard.cli.eval import eval as evaluate
from deltaguard.cli.gc import gc
from deltaguard.cli.info import info
from deltaguard.cli.keys import keys
from deltaguard.cli.push import push
from deltaguard.cli.report import report
from deltaguard.cli.restore import restore, restore_help
from deltaguard.cli.serve import serve
from deltaguard.cli.sink import Out, UsageError, complain
from deltaguard.cli.sweep import sweep
from deltaguard.cli.verify import verify
from deltaguard.errors import CheckFailedError, DeltaguardError
from deltaguard.text import printable_lines

DONE, FAILED, USAGE, CHECK_FAILED, BUG, INTERRUPTED = 0, 1, 2, 3, 70, 130
_AFTER_INTERRUPT = {
    "bench": " Run the same command again to go on.",
    "calibrate": " Run the same command again with `--resume`.",
    "eval": " Run the same command again to go on.",
    "restore": " Run the same command again with `--resume`.",
    "sweep": " Run the same command again; it starts from the beginning.",
}
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
    # Those of bash and fish are found where they are put; what zsh needs besides is printed.
    app.register_install_completion_command(
        add_to_startup=False, help="Have the shell complete verbs, options, names and folders."
    )
    return app


def run(tokens: Sequence[str]) -> int:
    """Carry out one command line.

    Args:
        tokens: the arguments, without the program's name.

    Returns:
        The exit code: 0 done, 1 known failure, 2 usage, 3 finished but a check failed, 70 a bug of
        deltaguard, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        # What the encoding cannot hold is shown as text, not as a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        build_app()(list(tokens), exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, UsageError) as error:
        complain(str(error), hint="Run `deltaguard --help`, or a verb with `--help`.")
        return USAGE
    except (DeltaguardError, OSError) as error:
        _trace()
        complain(str(error))
        return CHECK_FAILED if isinstance(error, CheckFailedError) else FAILED
    except KeyboardInterrupt:
        complain(f"Interrupted.{_AFTER_INTERRUPT.get(tokens[0] if tokens else '', '')}")
        return INTERRUPTED
    except MemoryError:
        complain("There is too little memory. Close other programs, or take a smaller batch or model.")
        return FAILED
    # The last stop: so a bug is never mistaken for a known failure.
    except Exception as error:  # noqa: BLE001
        _trace()
        complain(f"Unexpected {type(error).__name__}: {error}", hint=_REPORT)
        return BUG
    return DONE


def _trace() -> None:
    """Show where an error comes from, if that is asked for."""
    if os.environ.get("DELTAGUARD_DEBUG") == "1":
        print(printable_lines(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201
