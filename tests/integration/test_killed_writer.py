"""A writer that is killed at any moment leaves no half checkpoint, and can be resumed to the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import save, tiny_model


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step_and_resumed(tmp_path):
    source = save(tiny_model("llama"), tmp_path / "source", dtype=torch.bfloat16, max_shard_size="60KB")
    program = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run(
        [sys.executable, program, source, tmp_path], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    fresh, replacing, anew, whole = map(int, done.stdout.split())
    # Two shards, an index and a report: each is flushed, renamed, recorded, and moved into place.
    assert fresh > 4 * 4
    assert replacing > fresh
    assert anew == replacing
    assert whole > fresh
