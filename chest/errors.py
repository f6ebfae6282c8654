"""Errors that a user can cause, and the one way in which a script ends on them."""

import copyreg
import inspect
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from chest.running import Interrupted, alone, ending_on_signals


class ChestError(Exception):
    """Base of every error that input, parameters or surroundings can cause."""

    def __reduce__(self) -> tuple:
        """So that it comes whole out of another process, whatever its class is made from."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)


class ParameterError(ChestError):
    """A value in ``params.yaml`` that is unknown, of the wrong type, or impossible."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file: what was found, what was expected, what to do."""

    file: str | Path
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{printable(self.file)}\n"
            f"    found:    {printable(self.found)}\n"
            f"    expected: {printable(self.expected)}\n"
            f"    to do:    {printable(self.remedy)}"
        )


class FileError(ChestError):
    """A file that cannot be used; ``problem`` says why."""

    def __init__(self, problem: Problem):
        self.problem = problem
        super().__init__(str(problem))


class InputError(ChestError):
    """Bad input files; ``problems`` holds every one of them."""

    def __init__(self, problems: Iterable[Problem], details: str = ""):
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'' if count == 1 else 's'} with the input:"
        super().__init__(
            "\n".join([head, *(f"  {problem}" for problem in self.problems), *details.splitlines()])
        )


def refuse(problems: list[Problem]) -> None:
    """Raise InputError with all `problems`, sorted by file, if there is one."""
    if problems:
        raise InputError(sorted(problems, key=lambda p: (str(p.file), p.found)))


def printable(text: object) -> str:
    """`text` with control characters and lone surrogates escaped: a file name may hold any."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def run_stage(main: Callable[[], None]) -> None:
    """As `run`, for a script without arguments and one run at a time.

    `--help` prints its docstring.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(inspect.unwrap(main).__globals__["__doc__"].rstrip())
    elif arguments:
        print(f"ERROR: {arguments[0]}: a stage takes no argument; see params.yaml", file=sys.stderr)
        raise SystemExit(2)
    else:
        run(main, stage=Path(sys.argv[0]).stem)


def run(main: Callable[[], None], stage: str | None = None) -> None:
    """Run a script's `main`; what a user or the machine can cause ends it with one message.

    A ChestError, a full disk, a missing permission: exit code 1. Ctrl-C and SIGTERM: 128 and the
    signal's number, within seconds. With `stage`, a second run of that stage in the same folder is
    refused.
    """
    try:
        with ending_on_signals(), alone(stage) if stage else nullcontext():
            main()
    except ChestError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        where = f": {printable(error.filename)}" if error.filename else ""
        print(f"ERROR: {error.strerror or error}{where}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as error:
        end = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        print(f"Interrupted: {end.note}.", file=sys.stderr)
        raise SystemExit(128 + end.signal) from None
