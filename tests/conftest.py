"""Makes the tests' own helpers importable, and lets laws take as long as a busy machine needs."""

import gc
import os
import shutil
import sys
from pathlib import Path
from tempfile import mkdtemp

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from once import RUN  # found by the line above

# No test is about a power cut, and a flush takes longer than most of what is written.
os.fsync = lambda descriptor: None

settings.register_profile("deltaguard", deadline=None, max_examples=60)
settings.load_profile("deltaguard")


def pytest_configure(config):
    # The processes of a run inherit the variable.
    if not hasattr(config, "workerinput"):
        os.environ[RUN] = mkdtemp(prefix="deltaguard-tests-")
        # Nothing that an earlier run, or a user, has there is to be found.
        os.environ["DELTAGUARD_CACHE"] = f"{os.environ[RUN]}/cache"


def pytest_collection_finish():
    # trl collects garbage at the start of every training: what was imported need not be looked at each time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(RUN), ignore_errors=True)
