"""The next batches are read while the model computes: a thread reads ahead, and changes nothing of the order.

What a step reads is a function of the step alone, so a thread that guesses the next steps wrongly costs time and no
correctness: the batch that is asked for is then read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")
DEPTH = 2


class Prefetched(Generic[Batch]):
    """A function of the step whose next values are computed ahead in a thread.

    Args:
        read: the function; it is called in one thread at a time, and raises in the step that asks for its value.
        depth: how many steps ahead.
    """

    def __init__(self, read: Callable[[int], Batch], depth: int = DEPTH) -> None:
        self._read, self._depth = read, depth
        self._ahead: dict[int, Future[Batch]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def at(self, step: int) -> Batch:
        """The value of a step; those of the next ones are begun."""
        if self._pool is None:  # not before it is of use
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="bellbox-batches")
        for other in [one for one in self._ahead if not step <= one < step + self._depth]:
            self._ahead.pop(other).cancel()
        for each in range(step, step + self._depth + 1):
            if each not in self._ahead:
                self._ahead[each] = self._pool.submit(self._read, each)
        return self._ahead.pop(step).result()
