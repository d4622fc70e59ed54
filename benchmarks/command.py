"""The command by which a measurement was made, as its table names it."""

import shlex
from pathlib import Path

from deltaguard.reports.text import short_reference


def command(benchmark: str, aligned: Path, *options: object) -> str:
    """Write the command of a benchmark; of the aligned model's path the last part is enough.

    Example:
        >>> command("guard", Path("/home/me/aligned"), "--seeds", 0, 1)
        'python -m benchmarks.guard aligned --seeds 0 1'
    """
    words = ("python", "-m", f"benchmarks.{benchmark}", short_reference(str(aligned)), *map(str, options))
    return shlex.join(words)
