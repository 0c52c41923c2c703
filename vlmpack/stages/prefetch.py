"""Prefetch: run a function over items in threads, a few items ahead, in order, and lose nothing.

A failure in a thread is raised at the consumer, at the item that failed; a consumer that stops early
leaves no thread behind.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

In = TypeVar("In")
Out = TypeVar("Out")


def map_ahead(
    function: Callable[[In], Out], items: Iterable[In], *, num_threads: int, ahead: int
) -> Iterator[Out]:
    """Yield function(item) for each item, in order; up to `ahead` items are under way or waiting.

    Items are drawn in the consumer's thread, so whatever makes them needs no lock.

    Args:
        function: Called in a thread, or in line if `num_threads` is 0.
        items: Any iterable; it is not read more than `ahead` items before its result is asked for.
        num_threads: Threads that work at once.
        ahead: Items handed out before the first result is needed, at least 1.

    Yields:
        Results in the order of the items.

    Raises:
        Exception: Whatever the function or `items` raised, behind the results of the items before.
    """
    if num_threads == 0:
        for item in items:
            yield function(item)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vlmpack-prefetch")
    under_way: deque[Future[Out]] = deque()
    failure: Exception | None = None
    source = iter(items)
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:  # raised behind the results that were under way before it
                failure = error
                break
            under_way.append(pool.submit(function, item))
            if len(under_way) >= max(ahead, 1):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
