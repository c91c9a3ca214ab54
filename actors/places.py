"""Places for those who wait: a count with a limit, looked at and taken in one step."""

from collections.abc import Generator
from contextlib import contextmanager

from actors.protocol import QueueFull

RETRY_AFTER_S = 5
"""About the length of a short turn."""


class Places:
    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._n_taken = 0

    @property
    def n_taken(self) -> int:
        return self._n_taken

    @contextmanager
    def taken(self) -> Generator[None]:
        """Hold a place for the length of the block.

        Raises:
            QueueFull
        """
        if self._n_taken >= self._limit:
            raise queue_full(self._limit, self._what)
        self._n_taken += 1
        try:
            yield
        finally:
            self._n_taken -= 1


def queue_full(limit: int, what: str) -> QueueFull:
    return QueueFull(f"{limit} {what} already.", limit=limit, retry_after_s=RETRY_AFTER_S)
