"""Several processes: in order, errors and all, and none is left behind."""

import multiprocessing
import time

import pytest

from chest.errors import ChestError, InputError, Problem
from chest.images import ImageError
from chest.parallel import map_in_processes


def slow_when_even(x):
    time.sleep(0.02 * (x % 2 == 0))
    return x * x


def fails_at_seven(x):
    if x == 7:
        raise OSError(27, "File too large", "a.png")
    return x


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_come_in_order(processes):
    found = map_in_processes(slow_when_even, range(30), processes)
    assert list(found) == [x * x for x in range(30)]
    assert list(map_in_processes(slow_when_even, [], processes)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_that_of_the_function(processes):
    with pytest.raises(OSError, match="File too large") as error:
        list(map_in_processes(fails_at_seven, range(30), processes))
    assert error.value.filename == "a.png"
    assert not multiprocessing.active_children()


BAD = Problem("a.png", "nothing", "a picture", "fetch it")


@pytest.mark.parametrize(
    "error",
    [
        ImageError(BAD),
        InputError([BAD, BAD], "more"),
        ChestError("too little"),
        OSError(28, "full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_whole_out_of_its_process(error):
    def fail(_thing):
        raise error

    with pytest.raises(type(error)) as raised:
        list(map_in_processes(fail, range(30), 2))
    assert str(raised.value) == str(error)
    assert vars(raised.value) == vars(error)


def test_a_process_that_is_killed_is_told():
    found = map_in_processes(slow_when_even, range(100), 2)
    next(found)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(ChestError, match="has ended"):
        list(found)
    assert not multiprocessing.active_children()
