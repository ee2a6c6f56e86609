"""Work done ahead, in threads: decoding and reading files release Python's lock."""

import collections
import concurrent.futures


def map_ahead(function, items, *, threads, depth):
    """Yields (item, future of function(item)) in order, `depth` items ahead of the consumer.

    Memory is bounded by `depth`. What has not begun when the consumer stops is cancelled.
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
