"""Models and stores that take seconds to make: one process of a test run makes each, the others find it."""

import fcntl
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

RUN = "DELTAGUARD_TEST_RUN"
"""The variable with the folder of a test run, which conftest.py makes and removes."""


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that tests must not write to.

    Args:
        name: of the folder, and of what is in it.
        make: writes it, where no process of this run has.
    """
    root = Path(os.environ[RUN])
    folder, done = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@cache
def smollm2() -> Path:
    """SmolLM2 as the demo unpacks it, which takes twenty seconds."""
    from deltaguard.studies.models import save_smollm2

    return made_once("smollm2", save_smollm2)
