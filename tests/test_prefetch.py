"""Batches made ahead: the same ones in the same order, and errors where they belong."""

import threading

import pytest

from nmlib.prefetch import AHEAD, batches_ahead


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("count", [0, 1, AHEAD, 11])
def test_every_batch_comes_once_and_in_order(overlap: bool, count: int) -> None:
    steps = range(5, 5 + count)
    assert list(batches_ahead(lambda step: 3 * step, steps, overlap)) == [3 * step for step in steps]


def test_batches_are_made_while_the_caller_works() -> None:
    made, third = [], threading.Event()

    def make(step: int) -> int:
        made.append(threading.current_thread())
        if step == 2:
            third.set()
        return step

    coming = batches_ahead(make, range(7), overlap=True)
    assert next(coming) == 0 and third.wait(10), "two more are made without being asked for"
    assert threading.current_thread() not in made
    coming.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_is_raised_where_its_batch_is_wanted(overlap: bool) -> None:
    def make(step: int) -> int:
        if step == 2:
            raise KeyError("no such picture")
        return step

    coming = batches_ahead(make, range(6), overlap)
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(KeyError, match="no such picture"):
        next(coming)
