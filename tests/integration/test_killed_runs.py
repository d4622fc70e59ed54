"""Calibrations and restores that are killed at random moments give the bytes of undisturbed ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("DELTAGUARD_KILLS", "5"))
"""Of each; `make soak` has 100."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_and_resumed(tmp_path):
    program = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path, str(KILLS), "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300 + 20 * KILLS,
    )
    assert done.returncode == 0, done.stderr
    assert all(kills >= KILLS for kills in json.loads(done.stdout).values())
