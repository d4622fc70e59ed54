"""Put garak's reports side by side: its hits and deltaguard's judges, with intervals and paired tests.

    python examples/garak/table.py OUTPUT NAME=REPORT.report.jsonl [NAME=REPORT.report.jsonl ...]

The first model is the one that the others are compared with. `deltaguard report OUTPUT` draws the page.
"""

# ruff: noqa: INP001, T201  # a script that prints what it found
import sys
from pathlib import Path

import rich

from deltaguard import DeltaguardError
from deltaguard.evaluation.garak import garak_report
from deltaguard.reports.evaluation import evaluation_table


def main(output: str, *given: str) -> None:
    """Read the reports, and print and keep the table."""
    pairs = [(name, Path(path)) for name, _, path in (each.partition("=") for each in given)]
    runs = dict(pairs)
    if len(runs) < len(pairs):
        raise DeltaguardError("Two reports have one NAME: name each model otherwise.")
    report = garak_report(runs, output)
    rich.print(evaluation_table(report))
    print(f"Report: {Path(output) / 'README.md'}")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in each for each in sys.argv[2:]):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except DeltaguardError as error:
        sys.exit(f"Error: {error}")
