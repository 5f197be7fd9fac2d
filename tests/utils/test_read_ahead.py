"""Results come in order, a bounded number ahead, with their errors, and threads that hang hold nobody up."""

import threading
import time

import pytest

from src.utils.read_ahead import ReadAhead


def test_results_come_in_order_and_in_parallel() -> None:
    together = threading.Barrier(3)  # passes only where three are under way at once

    def fetch(number: int, stopping: threading.Event) -> int:
        together.wait(10)
        time.sleep(0.01 * (number % 3 == 0))
        return number * number

    with ReadAhead(fetch, 3, 9, parallel=3) as ahead:
        assert list(ahead) == [9, 16, 25, 36, 49, 64]


def test_no_more_are_begun_than_may_wait() -> None:
    begun: list[int] = []

    def fetch(number: int, stopping: threading.Event) -> int:
        begun.append(number)
        return number

    with ReadAhead(fetch, 0, 10, parallel=2) as ahead:
        assert ahead.result(1) == 1
        time.sleep(0.05)
        assert sorted(begun) == [0, 1]
        ahead.release(1)
        assert ahead.result(2) == 2
        time.sleep(0.05)
        assert sorted(begun) == [0, 1, 2]
        assert ahead.result(5) == 5, "asked for, so it comes before there is room"
        assert sorted(begun) == [0, 1, 2, 3, 4, 5]
        for never in (1, 10):  # released; beyond the end
            with pytest.raises(AssertionError):
                ahead.result(never)


def test_an_error_comes_in_its_place() -> None:
    def fetch(number: int, stopping: threading.Event) -> int:
        if number == 1:
            raise ValueError("one")
        return number

    with ReadAhead(fetch, 0, 4, parallel=4) as ahead:
        assert [ahead.result(0), ahead.result(2), ahead.result(3)] == [0, 2, 3]
        with pytest.raises(ValueError, match="one"):
            ahead.result(1)


def test_leaving_tells_the_threads_and_waits_for_none_that_hangs() -> None:
    told, hang = threading.Event(), threading.Event()

    def fetch(number: int, stopping: threading.Event) -> None:
        if number == 0:
            stopping.wait(10)
            told.set()
        else:
            hang.wait(10)

    start = time.monotonic()
    with ReadAhead(fetch, 0, 5, parallel=2):
        time.sleep(0.05)
    assert told.is_set()
    assert time.monotonic() - start < 2
    hang.set()


def test_nothing_to_do() -> None:
    with ReadAhead(lambda number, stopping: number, 4, 4, parallel=2) as ahead:
        assert list(ahead) == []
