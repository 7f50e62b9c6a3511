"""Many images read at once: an ordered map over threads, which pays because decoding and resizing leave Python's lock."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vqmosaic.runs.devices import available_cores

_LARGEST_CHUNK = 64  # items in one task: single small images would spend their time in the queue
_MOST_THREADS = 16


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any], bar: str | None = None) -> Iterator[Any]:
    """function(item) for each item, in order; the threads keep some results ahead of the reader, never all.

    `bar` is the text of a progress bar, shown where stderr is a terminal.
    """
    if len(items) < 2:
        return map(function, items)
    threads = min(available_cores(), _MOST_THREADS)
    results = _in_chunks(function, items, max(1, min(_LARGEST_CHUNK, len(items) // threads)), threads)
    if bar and sys.stderr.isatty():
        from tqdm import tqdm

        return iter(tqdm(results, total=len(items), desc=bar, unit=" images", leave=False))
    return results


def _in_chunks(function: Callable[[Any], Any], items: Sequence[Any], chunk: int, threads: int) -> Iterator[Any]:
    pool, pending = ThreadPoolExecutor(threads), deque()
    try:
        for start in range(0, len(items), chunk):
            pending.append(pool.submit(lambda part: [function(item) for item in part], items[start:start + chunk]))
            if len(pending) > 2 * threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # do not wait: a thread may be stuck reading a file
