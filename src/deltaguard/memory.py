"""How much memory this process has held, and how much it may hold."""

import os
import resource
import sys
from pathlib import Path

_CONTROL_GROUPS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where Linux says what a container may hold, in its newer and its older form."""


def peak_memory_bytes() -> int:
    """Say the largest resident set of the process so far, in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_memory_bytes() -> int:
    """Say how much memory the process may hold: the machine's, or less where its container has a limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    texts = (file.read_text().strip() for file in _CONTROL_GROUPS if file.is_file())
    return min([machine, *(int(text) for text in texts if text.isdigit())])
