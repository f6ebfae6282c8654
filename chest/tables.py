"""Tables as Markdown, as GitHub shows them."""

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of one line for each of `rows`, below `head`; no line break at its end.

    Cells are taken as they are: a `|` or a line break in one would end it.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
