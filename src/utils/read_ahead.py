"""Results made by threads a little ahead of their use, and taken in order."""

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LEAVE_S = 1.0


class ReadAhead(Generic[T]):
    """`fetch(number, stopping)` for `first` <= number < `end`, begun in order before the results are asked for.

    At most `parallel` numbers are under way or waiting to be released, which bounds what they hold, unless one further
    on is asked for. The threads
    work inside a `with` block. Leaving it sets the event `stopping`, for `fetch` to heed where it takes long, and
    waits a second at most: the threads are daemons, and one that hangs in a request keeps no process alive.
    """

    def __init__(self, fetch: Callable[[int, threading.Event], T], first: int, end: int, parallel: int) -> None:
        self._fetch = fetch
        self._first = self._next = first
        self._asked = first - 1  # the highest number that somebody waits for
        self._end = end
        self._parallel = parallel
        self._held: dict[int, tuple[Any, BaseException | None] | None] = {}  # None while under way
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(min(parallel, max(0, end - first)))
        ]

    def __enter__(self) -> "ReadAhead[T]":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        deadline = time.monotonic() + _LEAVE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __iter__(self) -> Iterator[T]:
        """All results, each released as it is handed over."""
        for number in range(self._first, self._end):
            result = self.result(number)
            self.release(number)
            yield result

    def result(self, number: int) -> T:
        """Waits for the result of `number`; raises what `fetch` raised for it."""
        with self._changed:
            self._asked = max(self._asked, number)
            self._changed.notify_all()
            while (outcome := self._held.get(number)) is None:
                assert number in self._held or self._next <= number < self._end, f"{number} was released"
                self._changed.wait()
        value, error = outcome
        if error is not None:
            raise error
        return value

    def release(self, number: int) -> None:
        """Forgets the result of `number`, so that another may begin."""
        with self._changed:
            del self._held[number]
            self._changed.notify_all()

    def _work(self) -> None:
        while (number := self._take()) is not None:
            try:
                outcome: tuple[Any, BaseException | None] = (self._fetch(number, self._stopping), None)
            except BaseException as error:  # for whoever asks for the result
                outcome = (None, error)
            with self._changed:
                self._held[number] = outcome
                self._changed.notify_all()

    def _take(self) -> int | None:
        """The next number, once there is room for it; None where there is no more to do."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopping.is_set()
                    or self._next >= self._end
                    or self._next <= self._asked
                    or len(self._held) < self._parallel
                )
            )
            if self._stopping.is_set() or self._next >= self._end:
                return None
            number, self._next = self._next, self._next + 1
            self._held[number] = None
            return number
