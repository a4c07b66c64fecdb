"""Batches that are made while the model learns from those before them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
AHEAD = 3  # batches that wait to be used


def batches_ahead(batch_at: Callable[[int], T], steps: Sequence[int], overlap: bool) -> Iterator[T]:
    """The batches of steps, in order.

    Args:
        batch_at: step -> batch; a pure function.
        steps: which, in order.
        overlap: make them in a thread beside the caller. It pays where a GPU does the learning; where the model
            itself keeps all cores busy it does not. What `batch_at` raises is raised where its batch is wanted.
    """
    if not overlap:
        yield from map(batch_at, steps)
        return
    with ThreadPoolExecutor(max_workers=1) as maker:
        try:
            coming = deque(maker.submit(batch_at, step) for step in steps[:AHEAD])
            for place in range(len(steps)):
                batch = coming.popleft().result()
                if place + AHEAD < len(steps):
                    coming.append(maker.submit(batch_at, steps[place + AHEAD]))
                yield batch
        finally:
            maker.shutdown(cancel_futures=True)
