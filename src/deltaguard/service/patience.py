"""Waiting out a database or an object store that does not answer."""

import logging
import time
from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import ParamSpec, TypeVar

from deltaguard.service.contents import UnavailableError
from deltaguard.service.errors import OUTAGES, cause_of

P = ParamSpec("P")
T = TypeVar("T")

AWAY = (*OUTAGES, UnavailableError)
"""What is raised where the database or the object store does not answer."""

_AGAIN_S, _TOLD_EVERY = 1.0, 60
"""Seconds until what met an outage is begun again, and how many of these times are told as one."""

_LOGGER = logging.getLogger(__name__)


def patient(function: Callable[P, T]) -> Callable[P, T]:
    """Begin a function again and again while the database or the object store does not answer.

    Args:
        function: does nothing twice.

    Example:
        >>> patient(len)("done")
        4
    """

    @wraps(function)
    def tried(*args: P.args, **named: P.kwargs) -> T:
        for time_before in count():
            try:
                return function(*args, **named)
            except AWAY as error:
                if time_before % _TOLD_EVERY == 0:
                    _LOGGER.error("A step waits: %s", cause_of(error))  # noqa: TRY400  # no bug
            time.sleep(_AGAIN_S)
        raise AssertionError("there is no last time")

    return tried
