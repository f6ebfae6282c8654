"""How scripts that a person runs describe themselves: their docstring is their help."""

import argparse


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the first line of `doc`, a script's docstring.

    What follows in `doc`, with the commands to copy, stands as it is below the options.
    """
    summary, _, rest = doc.partition("\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
