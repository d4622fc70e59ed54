"""The command line: one file per verb, and the only part of deltaguard that prints."""

import sys


def main() -> None:
    """Entry point of the `deltaguard` command."""
    try:
        # Importing takes long enough to be interrupted.
        from deltaguard.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        code = 130
    sys.exit(code)
