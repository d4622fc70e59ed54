"""Requests made by schemathesis from the service's OpenAPI schema: the test of it, with many more calls."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

from tools.service_results import Calls

from benchmarks.service.serving import TESTS
from deltaguard.device import device_name
from deltaguard.reports.records.base import environment

NO_BUG = "no call meets a bug"


def measure_calls(folder: Path, *, calls: int) -> Calls:
    """Run the tests' own calls, as many as are asked for.

    Args:
        folder: an empty folder; it receives what the test reports.
        calls: at least so many.
    """
    report, started = folder / "report.xml", time.monotonic()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1", str(TESTS / "service" / "test_schema.py")]
    ended = subprocess.run(command, env={**os.environ, "DELTAGUARD_CALLS": str(calls)}, check=False)
    seconds = time.monotonic() - started
    case = ET.parse(report).getroot().find(".//testcase")  # noqa: S314  # written by the line above
    assert case is not None
    known = {found.get("name"): found.get("value", "") for found in case.iter("property")}
    told = [found.get("message", "") for kind in ("failure", "error") for found in case.iter(kind)]
    statuses: dict[int, int] = {int(k): n for k, n in json.loads(known.get("statuses", "{}")).items()}
    made = sum(statuses.values())
    return Calls(
        environment=environment(device_name(), libraries=("schemathesis", "hypothesis", "fastapi")),
        seed=0,
        calls=made,
        operations=int(known.get("operations", 0)),
        statuses=statuses,
        seconds=seconds,
        broken={
            NO_BUG: tuple(told) or (() if ended.returncode == 0 else (f"exit code {ended.returncode}",)),
            f"at least {calls:,} calls were made": () if made >= calls else (f"{made:,}",),
        },
    )
