"""How much memory this process has held, and how much it may hold."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CONTROL_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux says what groups of processes may hold, and of which this one is."""


def peak_memory_bytes() -> int:
    """Say the largest resident set of the process so far, in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_memory_bytes() -> int:
    """Say how much memory the process may hold: the machine's, or what its container or job may."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    texts = (file.read_text().strip() for file in _limits() if file.is_file())
    return min([machine, *(int(text) for text in texts if text.isdigit())])


def _limits() -> Iterator[Path]:
    """List the files that may hold a limit: of the groups that this process is in, and of all above them."""
    yield _CONTROL_GROUPS / "memory.max"
    yield _CONTROL_GROUPS / "memory" / "memory.limit_in_bytes"
    for line in _OWN.read_text().splitlines() if _OWN.is_file() else ():
        _, kinds, path = line.split(":", 2)
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            below = group.as_posix().lstrip("/")
            if not kinds:
                yield _CONTROL_GROUPS / below / "memory.max"
            elif "memory" in kinds.split(","):
                yield _CONTROL_GROUPS / "memory" / below / "memory.limit_in_bytes"
