"""Measure, print a table, and write `docs/results/benchmark.json`: `python -m benchmarks.run`.

The inputs are made in the work folder at the first run (several minutes, 17 GB; 27 GB with `--full`) and
reused; 5 GB more are needed while it runs.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row
from benchmarks.suite import Suite, measure
from benchmarks.targets import Target, check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "benchmark.json"


def main() -> int:
    """Parse the command line and run; give 1 where a target is missed, or a whole run lacks a row, else 0."""
    options = _options()
    console = Console()
    suite = Suite(options.work, options.runs, options.full)
    names = options.only or list(suite.benchmarks)
    unknown = sorted(set(names) - suite.benchmarks.keys())
    if unknown:
        raise SystemExit(f"No such row: {', '.join(unknown)}. There are {', '.join(suite.benchmarks)}.")
    console.print("inputs")
    suite.prepare(names)
    missing = dict(measure(suite, names, console.print))
    targets = check(suite.rows)
    _draw(console, suite, missing, targets)
    path = options.work / "benchmark.json" if options.only else RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_document(suite, missing, targets), indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {path}")
    # Of a whole run, what could not be measured has not been kept either.
    return int(any(not target.met for target in targets) or (bool(missing) and not options.only))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this row; may be given several times"
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work", metavar="DIR")
    parser.add_argument("--runs", type=int, default=3, help="an odd number, of which the median counts")
    parser.add_argument("--full", action="store_true", help="run the slow solvers on all blocks")
    options = parser.parse_args()
    if options.runs < 1 or options.runs % 2 == 0:
        parser.error("--runs must be odd")
    return options


def _document(suite: Suite, missing: dict[str, str], targets: list[Target]) -> dict[str, Any]:
    return {
        "environment": suite.environment(),
        "rows": [asdict(row) for row in suite.rows.values()],
        "targets": [asdict(target) for target in targets],
        "not_available": missing,
    }


def _draw(console: Console, suite: Suite, missing: dict[str, str], targets: list[Target]) -> None:
    table = Table(title="Page cache warm, medians of whole processes unless the note says otherwise")
    for column in ("what", "seconds", "peak memory", "ratio", "note"):
        table.add_column(column, justify="left" if column in {"what", "note"} else "right")
    for row in suite.rows.values():
        table.add_row(row.name, f"{row.seconds:.2f}", _memory(row), _ratio(row), row.note)
    for name, reason in missing.items():
        table.add_row(name, "not available", "", "", reason)
    console.print(table)
    for target in targets:
        console.print(f"{'met' if target.met else 'NOT MET'}: {target.name} ({target.measured})")


def _memory(row: Row) -> str:
    return "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e9:.2f} GB"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
