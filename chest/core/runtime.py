"""Entry point of stages and tools: help, errors as messages, and a clean end on signals."""

import argparse
import errno
import gc
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from chest.core.errors import ChestError, printable

STOPPING = (signal.SIGINT, signal.SIGTERM)
# Errors of the machine that the user can do something about.
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# Each returns what a user can do about an exception, or None. PyTorch's are added where it is used.
explanations: list[Callable[[Exception], str | None]] = []


def run_stage(main: Callable[..., None], argument: str | None = None) -> None:
    """Run the `main` of a stage; ``--help`` prints its docstring.

    `main` takes no arguments, or the one that `argument` names: which of several blocks of
    params.yaml it is to run.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(inspect.unwrap(main).__globals__["__doc__"].strip())
        return
    options = any(text.startswith("-") for text in arguments)
    if options or len(arguments) != (argument is not None):
        takes = f"one argument, {argument}" if argument else "no argument"
        given = " ".join(map(printable, arguments)) or "nothing given"
        print(f"ERROR: {given}: this stage takes {takes}; see params.yaml", file=sys.stderr)
        raise SystemExit(2)
    run(partial(main, *arguments))


def run(main: Callable[[], None]) -> None:
    """Run `main` and turn what a user can cause into one message and an exit code.

    ChestError, a full disk and missing permissions exit with 1; Ctrl-C and SIGTERM with 128 plus
    the number of the signal, after all context managers have cleaned up.
    """
    for number in STOPPING:
        signal.signal(number, _interrupt)
    gc.freeze()  # spares garbage collection what was imported: a second at the end of a stage
    try:
        main()
    except ChestError as error:
        sys.exit(f"ERROR: {error}")
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        sys.exit(f"ERROR: {error.strerror}: {printable(error.filename or 'the disk')}")
    except RuntimeError as error:
        told = next(filter(None, (explain(error) for explain in explanations)), None)
        if told is None:
            raise
        sys.exit(f"ERROR: {told}")
    except KeyboardInterrupt as interrupt:
        print("\n".join(["Interrupted.", *getattr(interrupt, "__notes__", [])]), file=sys.stderr)
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        sys.exit(128 + number)


def run_tool(main: Callable[[], None]) -> None:
    """Run the `main` of a tool, which reads and writes below the repository's root."""
    if not Path("dvc.yaml").exists() and not {"-h", "--help"} & {*sys.argv}:
        sys.exit("ERROR: there is no dvc.yaml here: run this in the repository's root")
    run(main)


def parser(doc: str) -> argparse.ArgumentParser:
    """Make a parser for a tool; its docstring `doc` is the help, the first line the summary."""
    summary, _, rest = doc.partition("\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Let a block stop at a point of its choice.

    Within the block, a first Ctrl-C or SIGTERM is only noted: the function that is yielded then
    returns True, and KeyboardInterrupt is raised where the block ends. A second signal raises at
    once. Usable in the main thread only.
    """
    noted: list[int] = []

    def note(number: int, frame) -> None:
        if noted:
            _interrupt(number, frame)
        noted.append(number)

    before = [signal.signal(number, note) for number in STOPPING]
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)
    if noted:
        raise KeyboardInterrupt(noted[0])


@contextmanager
def interrupt_note(note: str) -> Iterator[None]:
    """Attach `note` to an interrupt raised in this block."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(note)
        raise


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(number)
