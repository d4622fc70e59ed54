"""A limit of time for code from outside, in whichever thread it runs."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

from deltaguard.errors import DeltaguardError

_AGAIN = 1.0
"""Seconds after which code is stopped once more: an exception may be lost, in a destructor for example."""

T = TypeVar("T")


class _OutOfTimeError(BaseException):
    """No `Exception`, so that the code that is stopped does not handle it."""


def run_within(seconds: float, call: Callable[[], T], *, message: str) -> T:
    """Call a function, and stop it if it takes too long.

    A second thread waits, and raises an exception in this one. That costs a fraction of a millisecond and
    needs no signal, so that it works in every thread. It stops what runs as Python, such as loops; one single
    operation in C is not interrupted.

    Args:
        seconds: how long it may take.
        call: the function.
        message: of the error.

    Returns:
        What the function returns.

    Raises:
        DeltaguardError: it took longer.

    Example:
        >>> run_within(1.0, lambda: 6 * 7, message="Counting takes too long.")
        42
    """
    thread, lock, ended = threading.get_ident(), threading.Lock(), threading.Event()

    def watch() -> None:
        pause = seconds
        while not ended.wait(pause):
            with lock:
                if not ended.is_set():
                    _raise_in(thread, _OutOfTimeError)
            pause = _AGAIN

    def end() -> None:
        """Raise nothing from now on, and take back what was raised and did not arrive yet."""
        with lock:
            ended.set()
            _raise_in(thread, None)

    # No context manager: between its call and its first line an exception would not be seen by it.
    try:
        try:
            threading.Thread(target=watch, name="deltaguard-time-limit", daemon=True).start()
            return call()
        finally:
            end()
    except _OutOfTimeError:
        # It may have come while the watch was being ended.
        end()
        raise DeltaguardError(message) from None


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Let a thread raise an exception as soon as it runs Python again; None forgets one that waits."""
    what = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
