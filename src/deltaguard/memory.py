"""The largest amount of memory that this process has held."""

import resource
import sys


def peak_memory_bytes() -> int:
    """Largest resident set of the process so far, in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
