"""Results in order, failures at the item that failed, no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmpack.stages.prefetch import map_ahead

pytestmark = pytest.mark.timeout(30)


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("vlmpack")}


@given(n=st.integers(0, 30), num_threads=st.integers(0, 4), ahead=st.integers(1, 9))
def test_every_result_comes_once_and_in_order(n, num_threads, ahead):
    squares = map_ahead(lambda x: x * x, range(n), num_threads=num_threads, ahead=ahead)
    assert list(squares) == [x * x for x in range(n)]
    assert not threads()


def test_order_holds_when_early_items_take_longest():
    def slow(x):
        time.sleep(0.02 * (4 - x))
        return x

    assert list(map_ahead(slow, range(5), num_threads=4, ahead=5)) == list(range(5))


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_a_failure_is_raised_at_its_item_after_the_ones_before(num_threads):
    def fail_at_3(x):
        if x == 3:
            raise KeyError("at 3")
        return x

    seen = []
    with pytest.raises(KeyError, match="at 3"):
        seen.extend(map_ahead(fail_at_3, range(10), num_threads=num_threads, ahead=4))
    assert seen == [0, 1, 2]
    assert not threads()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_failing_source_is_raised_behind_the_results_before_it_and_leaves_no_thread(num_threads):
    def items():
        yield from range(3)
        raise OSError("source")

    seen = []
    with pytest.raises(OSError, match="source"):
        seen.extend(map_ahead(str, items(), num_threads=num_threads, ahead=8))
    assert seen == ["0", "1", "2"]
    assert not threads()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_consumer_that_stops_early_leaves_no_thread_and_closes_the_source(num_threads):
    closed = []

    def items():
        try:
            yield from range(1000)
        finally:
            closed.append(True)

    results = map_ahead(str, items(), num_threads=num_threads, ahead=4)
    assert next(results) == "0"
    assert threads() or not num_threads
    results.close()
    assert not threads()
    assert closed == [True]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_source_is_read_no_further_than_promised(ahead):
    drawn = []

    def items():
        for x in range(100):
            drawn.append(x)
            yield x

    results = map_ahead(str, items(), num_threads=2, ahead=ahead)
    assert not drawn, "nothing is read before the first result is asked for"
    for number in range(5):
        next(results)
        assert len(drawn) <= number + ahead
    results.close()


def test_items_are_drawn_in_the_thread_of_the_consumer():
    drawn_in, worked_in = set(), set()

    def items():
        for x in range(20):
            drawn_in.add(threading.current_thread())
            yield x

    list(map_ahead(lambda _: worked_in.add(threading.current_thread()), items(), num_threads=2, ahead=4))
    assert drawn_in == {threading.current_thread()}
    assert threading.current_thread() not in worked_in


def test_work_goes_on_while_the_consumer_is_busy():
    done = threading.Event()

    def work(x):
        if x == 1:
            done.set()
        return x

    results = map_ahead(work, range(3), num_threads=1, ahead=2)
    assert next(results) == 0
    assert done.wait(10), "the second item is worked on before it is asked for"
    results.close()
