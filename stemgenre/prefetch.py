"""Prefetching in threads, which works because decoding and reading release the GIL."""

import collections
import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any


def prefetch_map(
    function: Callable, items: Iterable, *, threads: int, depth: int
) -> Iterator[tuple[Any, concurrent.futures.Future]]:
    """Yields (item, future of function(item)) in order, `depth` items ahead of the consumer.

    Memory is bounded by `depth`. Calls that have not started when the consumer stops are cancelled.
    """
    items, pending = iter(items), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) > depth:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, future in pending:
                future.cancel()


def batch_values(
    items: Iterable[tuple[Any, Any]],
    kind: type,
    function: Callable[[list], Iterable],
    *,
    size: Callable[[], int],
    alike: Callable[[Any], Any] = lambda value: None,
) -> Iterator[tuple[Any, Any]]:
    """Yields (owner, value) as `items` does, values of type `kind` replaced by function's results.

    `function` takes a list of as many as size() at most, for which `alike` gives the same.
    """
    held, batch = [], []

    def flush():
        results = iter(function(batch)) if batch else iter(())
        for owner, value in held:
            yield owner, next(results) if isinstance(value, kind) else value
        held.clear()
        batch.clear()

    for owner, value in items:
        if isinstance(value, kind):
            if batch and alike(batch[0]) != alike(value):
                yield from flush()
            batch.append(value)
        held.append((owner, value))
        if not batch or len(batch) >= size():
            yield from flush()
    yield from flush()


def prefetch(items: Generator, *, depth: int) -> Iterator:
    """Yields what the generator `items` does, run in a thread `depth` items ahead."""
    end = object()
    calls = prefetch_map(
        lambda each: next(each, end), itertools.repeat(items), threads=1, depth=depth
    )
    with contextlib.closing(items), contextlib.closing(calls):
        for _, future in calls:
            if (item := future.result()) is end:
                return
            yield item
