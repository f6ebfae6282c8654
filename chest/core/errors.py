"""Errors that a user can cause. Any other exception is a bug and keeps its traceback."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class ChestError(Exception):
    """Base of every error that input, parameters or the environment can cause."""


class ParameterError(ChestError):
    """A value in ``params.yaml`` that is unknown, of the wrong type, or impossible."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file: what was found, what was expected, what to do."""

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
        super().__init__(problem)
        self.problem = problem


class InputError(ChestError):
    """Bad input files; ``problems`` lists all of them."""

    def __init__(self, problems: Iterable[Problem], details: str = ""):
        self.problems = list(problems)
        self.details = details
        super().__init__(self.problems, details)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{count} problem{'' if count == 1 else 's'} with the input:"
        lines = [f"  {problem}" for problem in self.problems]
        return "\n".join([head, *lines, *self.details.splitlines()])


def refuse(problems: Iterable[Problem]) -> None:
    """Raise InputError with all `problems`, sorted by file, unless there are none."""
    problems = sorted(problems, key=lambda problem: (str(problem.file), problem.found))
    if problems:
        raise InputError(problems)


def printable(text: object) -> str:
    """Escape control characters and lone surrogates in `text`: file names may hold any."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )
