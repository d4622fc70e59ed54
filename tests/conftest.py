"""Makes the tests' own helpers importable, and lets laws take as long as a busy machine needs."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("deltaguard", deadline=None, max_examples=60)
settings.load_profile("deltaguard")
