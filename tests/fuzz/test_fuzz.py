"""Whatever an input holds: success, or one message; no traceback, no hang.

2,000 inputs by default, divided among the kinds. DELTAGUARD_FUZZ gives another number, as `make soak` does,
and DELTAGUARD_FUZZ_SEED other inputs of the same number.
"""

import os
import random
import time
import traceback
from pathlib import Path

import data_targets
import model_targets
import pytest
import reply_targets
import report_targets
import resumed_targets

from deltaguard.cli.sink import UsageError
from deltaguard.errors import DeltaguardError
from deltaguard.time_limit import run_within
from targets import Kind, Target

COUNT = int(os.environ.get("DELTAGUARD_FUZZ", "2000"))
SEED = os.environ.get("DELTAGUARD_FUZZ_SEED", "0")
SECONDS = 10.0
_SHOWN = 5

KINDS = (
    *model_targets.KINDS,
    *data_targets.KINDS,
    *report_targets.KINDS,
    *resumed_targets.KINDS,
    *reply_targets.KINDS,
)
_SHARES = sum(kind.share for kind in KINDS)


def failure(target: Target, content: bytes) -> str | None:
    """What went wrong with one input, or None."""
    started = time.monotonic()
    found = None
    try:
        run_within(3 * SECONDS, lambda: target.read(content), message="stopped")
    except (DeltaguardError, UsageError):
        pass
    # The test is about everything else.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = "".join(traceback.format_exception(error))
    seconds = time.monotonic() - started
    return f"It took {seconds:.1f} s." if found is None and seconds > SECONDS else found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore")
def test_whatever_an_input_holds_it_is_read_or_refused(kind: Kind, tmp_path: Path):
    target = kind.make(tmp_path)
    # What it imports when it is used first is no work of an input's.
    failure(target, target.content)
    assert failure(target, target.content) is None
    wrong = []
    for number in range(max(1, round(COUNT * kind.share / _SHARES))):
        content = target.damage(target.content, random.Random(f"{SEED} {kind.name} {number}"))
        found = failure(target, content)
        if found is not None:
            kept = tmp_path / f"input-{number}"
            kept.write_bytes(content)
            wrong.append(
                f"Input {number} of {kind.name} with seed {SEED}, {kept}: {content[:500]!r}\n{found}"
            )
    assert not wrong, f"{len(wrong)} inputs failed.\n\n" + "\n\n".join(wrong[:_SHOWN])
