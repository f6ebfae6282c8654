"""A script among others on the machine: signals that end it, and one run of a stage at a time."""

from chest.early import ENDING, NOTE

import errno
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

WORK = Path(".resume")  # locks and unfinished work; neither Git nor DVC tracks it
MOMENT = 0.01  # seconds until a signal that struck where nothing can be raised is heeded
GRACE = 4.0  # seconds from a signal to the end, where work must first come to a point


class Interrupted(KeyboardInterrupt):
    """The script was told to end; ``signal`` is the number, ``note`` what is left behind."""

    def __init__(self, number: int, note: str = NOTE):
        self.signal = number
        self.note = note
        super().__init__(note)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Meanwhile SIGTERM raises Interrupted, as Ctrl-C does, so that everything is tidied up.

    Where Python must not let an exception out (in a finalizer, say), it is raised a moment later.
    """
    missed: list[int] = []
    report = sys.unraisablehook

    def end(number: int, _frame) -> None:
        raise Interrupted(number)

    def end_now(_number: int, _frame) -> None:
        raise Interrupted(missed[0])

    def unraisable(raised) -> None:
        if not isinstance(raised.exc_value, Interrupted):
            report(raised)
            return
        missed.append(raised.exc_value.signal)
        signal.setitimer(signal.ITIMER_REAL, MOMENT)

    with _handling({**dict.fromkeys(ENDING, end), signal.SIGALRM: end_now}):
        sys.unraisablehook = unraisable
        try:
            yield
        finally:
            sys.unraisablehook = report
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def deferring_signals() -> Iterator[Callable[[], int]]:
    """Meanwhile a signal to end is noted only: the function that is given returns its number, or 0.

    So work can stop where its state is whole: once it has been told, it may take its time. If it
    does not ask within GRACE seconds, or by the same signal a second time, Interrupted is raised
    after all, and at the end, where nobody asked.
    """
    asked: list[int] = []

    def note(number: int, _frame) -> None:
        # Another signal is no second request: a launcher sends SIGTERM after the terminal's SIGINT.
        if number in asked:
            raise Interrupted(number)
        asked.append(number)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def tell() -> int:
        if asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return asked[0] if asked else 0

    def overdue(_number: int, _frame) -> None:
        raise Interrupted(asked[0])

    with _handling({**dict.fromkeys(ENDING, note), signal.SIGALRM: overdue}):
        try:
            yield tell
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if asked:
            raise Interrupted(asked[0])


@contextmanager
def alone(stage: str) -> Iterator[None]:
    """Hold the lock of `stage` in the working directory; it goes with the process that held it.

    Of the processes that `accelerate launch` starts the first one holds it for all. Raises
    BlockingIOError where another run holds it, and OSError where the lock is a symbolic link.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    WORK.mkdir(exist_ok=True)
    lock = WORK / f"{stage}.lock"
    if lock.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link, not a lock; remove it", str(lock))
    with open(lock, "a+", encoding="utf-8", opener=_opening_no_link) as file:
        if not _locked(file):
            file.seek(0)
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"{stage} is running in this folder already (process {file.read().strip()}):"
                " wait for it, or end it",
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _opening_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _locked(file: IO) -> bool:
    """Whether the lock could be had; processes that a killed run started hold it for a moment."""
    for wait in (0.1, 0.2, 0.4, 0.8, 0):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(wait)
    return False


@contextmanager
def _handling(handlers: dict[int, Callable]) -> Iterator[None]:
    """Handle these signals so, and as before afterwards; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
