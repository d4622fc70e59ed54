"""The command line: one file per verb, and the only part of deltaguard that prints."""

from deltaguard.cli.app import main

__all__ = ["main"]
