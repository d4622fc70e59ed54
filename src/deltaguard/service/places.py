"""Places for requests that models answer: there are so many, and one organisation has no more than a part."""

import threading
from collections import Counter

from deltaguard.service.errors import ApiError


class Places:
    """Places of requests that wait or are being answered.

    Attributes:
        most: places of all organisations together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock, self._taken = threading.Lock(), Counter[str]()

    @property
    def taken(self) -> int:
        """How many are taken."""
        return self._taken.total()

    @property
    def of_one(self) -> int:
        """How many an organisation has at most: three quarters, so that it leaves some to others."""
        return self.most - self.most // 4

    def take(self, organisation: str) -> None:
        """Take a place.

        Raises:
            ApiError: there is none, or the organisation has its part.
        """
        with self._lock:
            if self.taken >= self.most:
                message = "Too many chats are waiting. Try again."
                raise ApiError(503, message, code="overloaded", retry_after=2)
            if self._taken[organisation] >= self.of_one:
                message = (
                    f"{self.of_one} chats of this organisation are waiting, and may at a time. Try again."
                )
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=2)
            self._taken[organisation] += 1

    def give_back(self, organisation: str) -> None:
        """Give a place back."""
        with self._lock:
            self._taken[organisation] -= 1
            # Nothing is kept of organisations that ask nothing.
            self._taken += Counter()
