"""One function over many things in several processes, in order, and well-behaved when it ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from chest.errors import ChestError
from chest.progress import workers

AHEAD = 4  # things for each process, from the one that is due to the last one handed out
Thing = TypeVar("Thing")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Thing], Result], things: Sequence[Thing], processes: int | None = None
) -> Iterator[Result]:
    """`function` of each of `things`, in their order, by `processes` (default: one a core).

    A few things are in work at a time, so that memory does not grow with their number. The
    processes end with this one, however it ends, and with the iterator: close it where it is left
    early.

    Raises what `function` raises, and ChestError where a process ended by itself: the system may
    have done that.
    """
    processes = min(processes or workers(), len(things))
    if processes < 2:
        yield from map(function, things)
        return
    upcoming, busy, done = 0, {}, {}
    with _crew(function, processes) as free:
        for turn in range(len(things)):
            while True:
                while free and upcoming < min(len(things), turn + AHEAD * processes):
                    with _telling_of_an_end():
                        free[-1].send(things[upcoming])
                    busy[free.pop()] = upcoming
                    upcoming += 1
                if turn in done:
                    break
                for line in wait(busy):
                    with _telling_of_an_end():
                        done[busy.pop(line)], error = line.recv()
                    if error is not None:
                        raise error
                    free.append(line)
            yield done.pop(turn)


@contextmanager
def _crew(function: Callable, count: int) -> Iterator[list[Connection]]:
    """`count` processes at the other ends of the lines: each answers a thing by result and error.

    In the end they are killed: nobody needs what they have in work. (An executor of
    concurrent.futures that is interrupted twice may wait for its processes for ever.)
    """
    lines: list[Connection] = []
    crew: list[multiprocessing.Process] = []
    try:
        for _ in range(count):
            line, far_end = multiprocessing.Pipe()
            lines.append(line)
            process = multiprocessing.Process(target=_work, args=(far_end, function), daemon=True)
            process.start()
            crew.append(process)
            far_end.close()  # so that the line breaks when the process ends
        yield list(lines)
    finally:
        for process in crew:
            process.kill()
        for process in crew:
            process.join()
        for line in lines:
            line.close()


@contextmanager
def _telling_of_an_end() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise ChestError(
            "a process that worked for this one has ended: was there too little memory?"
        ) from None


def _work(line: Connection, function: Callable) -> None:
    """Leave Ctrl-C to the process that started this one, and end when it ends, however it does."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        thing = line.recv()
        try:
            line.send((function(thing), None))
        except Exception as error:
            line.send((None, error))
