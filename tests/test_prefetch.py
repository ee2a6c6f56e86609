"""Prefetched results arrive in order, within the given depth, and stop with their consumer."""

import threading
import time

import pytest

from stemgenre.prefetch import prefetch_map


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    assert condition()


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_results_arrive_in_the_order_of_the_items(threads, depth):
    def slow_at_first(number):
        time.sleep(0.005 if number % 3 == 0 else 0)
        return number**2

    ahead = prefetch_map(slow_at_first, iter(range(20)), threads=threads, depth=depth)
    assert [(item, future.result()) for item, future in ahead] == [(n, n**2) for n in range(20)]


def test_no_items_give_no_results():
    assert list(prefetch_map(str, [], threads=2, depth=5)) == []


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_no_more_than_the_depth_is_prefetched(depth):
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    ahead = prefetch_map(lambda number: number, items(), threads=2, depth=depth)
    for consumed, (_, future) in enumerate(ahead, start=1):
        future.result()
        time.sleep(0.001)
        assert len(taken) <= consumed + depth


def test_calls_run_in_parallel():
    together = threading.Barrier(3, timeout=10)
    ahead = prefetch_map(lambda _: together.wait(), range(3), threads=3, depth=3)
    assert sorted(future.result() for _, future in ahead) == [0, 1, 2]


def test_an_error_arrives_with_its_item_and_the_others_continue():
    def work(number):
        if number == 3:
            raise ValueError("three")
        return number

    results = []
    for item, future in prefetch_map(work, range(6), threads=2, depth=2):
        if item == 3:
            with pytest.raises(ValueError, match="three"):
                future.result()
        else:
            results.append(future.result())
    assert results == [0, 1, 2, 4, 5]


def test_calls_that_have_not_started_are_cancelled_with_the_consumer():
    started, gate, before = [], threading.Event(), set(threading.enumerate())

    def work(number):
        started.append(number)
        gate.wait(10)

    ahead = prefetch_map(work, range(100), threads=1, depth=50)
    next(ahead)
    wait_until(lambda: started == [0])
    threading.Timer(0.1, gate.set).start()
    ahead.close()
    assert started == [0]
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("ThreadPoolExecutor")]
