"""A stage that is told to end while it still imports its modules: one message, and nothing done.

Each script of stages/ imports this before all else, which may take seconds. Until its `main` runs,
nothing has been begun, and once that is over, nothing is left to do: so it ends there and then. In
between chest.running tidies up. Whoever imports a stage, or runs it within another script, keeps
the signals as they are.
"""

import atexit
import os
import signal
import sys

ENDING = (signal.SIGINT, signal.SIGTERM)
NOTE = "nothing half-written is left behind"


def end(number: int, _frame) -> None:
    try:
        os.write(2, f"Interrupted: {NOTE}.\n".encode())
    finally:
        os._exit(128 + number)


def handle_signals(handler) -> None:
    for number in ENDING:
        signal.signal(number, handler)


if os.path.basename(os.path.dirname(os.path.abspath(sys.orig_argv[-1]))) == "stages":
    handle_signals(end)
    # Registered first, called last: Python is about to take itself apart, and handlers with it.
    atexit.register(handle_signals, signal.SIG_IGN)
