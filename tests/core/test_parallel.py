"""Work on several cores comes back in order, and errors come back as they are."""

import os
import time

import pytest

from chest.core.parallel import parallel_map, workers


def slow_square(x):
    time.sleep(0.02 * (3 - x % 4))  # later items are often done first
    return x * x


def process(_):
    time.sleep(0.05)
    return os.getpid()


def fail(x):
    if x == 2:
        raise ZeroDivisionError("the third")
    return x


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order(processes):
    assert list(parallel_map(slow_square, range(8), processes)) == [x * x for x in range(8)]


def test_several_processes_work():
    assert len({*parallel_map(process, range(6), 2)} - {os.getpid()}) == 2


def test_one_process_is_this_one():
    assert {*parallel_map(process, range(2), 1)} == {os.getpid()}
    assert workers() >= 1


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_raised_as_it_is(processes):
    with pytest.raises(ZeroDivisionError, match="the third"):
        list(parallel_map(fail, range(4), processes))


def test_nothing_gives_nothing():
    assert list(parallel_map(fail, [])) == []
