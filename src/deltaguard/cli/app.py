"""The program: its verbs, and what becomes of errors."""

import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from deltaguard import __version__
from deltaguard.cli.bench import bench
from deltaguard.cli.calibrate import calibrate
from deltaguard.cli.demo import demo
from deltaguard.cli.diff import diff
from deltaguard.cli.eval import eval as evaluate
from deltaguard.cli.info import info
from deltaguard.cli.report import report
from deltaguard.cli.restore import restore
from deltaguard.cli.sink import UsageError, complain
from deltaguard.cli.sweep import sweep
from deltaguard.cli.verify import verify
from deltaguard.errors import CheckFailedError, DeltaguardError

DONE, FAILED, USAGE, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
_AFTER_INTERRUPT = {
    "bench": " Run the same command again to go on.",
    "calibrate": " Run the same command again with `--resume`.",
    "eval": " Run the same command again to go on.",
    "restore": " Run the same command again with `--resume`.",
    "sweep": " Run the same command again; it starts from the beginning.",
}


def build_app() -> App:
    """The program with all its verbs."""
    app = App(
        name="deltaguard",
        help="Give a fine-tuned language model its refusals back.",
        version=__version__,
        help_format="markdown",
        # `run` says how to go on.
        suppress_keyboard_interrupt=False,
    )
    for verb in (demo, calibrate, restore, sweep, diff, verify, evaluate, bench, report, info):
        app.command(verb)
    return app


def run(tokens: Sequence[str]) -> int:
    """Carry out one command line.

    Args:
        tokens: the arguments, without the program's name.

    Returns:
        The exit code: 0 done, 1 known failure, 2 usage, 3 finished but a check failed, 130 interrupted.
    """
    try:
        build_app()(list(tokens), exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, UsageError) as error:
        complain(str(error), hint="Run `deltaguard --help`, or a verb with `--help`.")
        return USAGE
    except (DeltaguardError, OSError) as error:
        if os.environ.get("DELTAGUARD_DEBUG") == "1":
            traceback.print_exc()
        complain(str(error))
        return CHECK_FAILED if isinstance(error, CheckFailedError) else FAILED
    except KeyboardInterrupt:
        complain(f"Interrupted.{_AFTER_INTERRUPT.get(tokens[0] if tokens else '', '')}")
        return INTERRUPTED
    return DONE


def main() -> None:
    """Entry point of the `deltaguard` command."""
    sys.exit(run(sys.argv[1:]))
