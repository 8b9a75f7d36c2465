"""Run a model over many batches on all processors, with the answers in order and bit for bit those of one thread.

Every batch runs whole on one thread (ONNX Runtime takes concurrent runs of one session and works outside Python's lock), so
that neither the values nor their order depend on the number of processors.

    >>> list(in_order(lambda value: value * value, [1, 2, 3]))
    [1, 4, 9]
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_WORKERS = 4
"""More batches at a time would hold more memory than they save time."""


def processors() -> int:
    """Processors that this process may use, at most :data:`MOST_WORKERS`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, usable))


def in_order(call: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """``call`` of each item, in the order of the items; not more than ``workers`` results are made ahead of the reader.

    Args:
        call: safe to run on several threads at once.
        items: taken one after the other, by the reader's thread.
        workers: threads; :func:`processors` where it is not given.

    Raises:
        Exception: whatever ``call`` raised, at that item's place; the items behind it are given up.
    """
    count = processors() if workers is None else workers
    if count <= 1:
        yield from map(call, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="edgekit-batch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) >= count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
