"""Several processes of one command, as torchrun starts them: the first prints, the others keep quiet."""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager


def processes() -> int:
    """Say how many processes torchrun started for this command; without it there is one."""
    # Of these only torchrun, and what stands for it, sets both.
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def leads() -> bool:
    """Tell whether this process is the first of them."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def quiet(*, unless: bool) -> Generator[Callable[[], AbstractContextManager[None]]]:
    """Let nothing that this process prints be seen, whichever library prints it, as long as the block lasts.

    Args:
        unless: whether it may print all the same.

    Yields:
        What lets it print for a while, on stderr.
    """
    if unless:
        yield _as_it_is
        return
    sys.stdout.flush()
    sys.stderr.flush()
    shown = [(stream, os.dup(stream)) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)

    @contextmanager
    def aloud() -> Generator[None]:
        os.dup2(shown[1][1], 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(nowhere, 2)

    try:
        for stream, _ in shown:
            os.dup2(nowhere, stream)
        yield aloud
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, own in shown:
            os.dup2(own, stream)
            os.close(own)
        os.close(nowhere)


@contextmanager
def _as_it_is() -> Generator[None]:
    yield
