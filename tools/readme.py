"""Fill the README's table of results from metrics/model_card.md.

    python tools/readme.py        (or: make readme)

Reads   metrics/model_card.md: its table that begins with UAR
Writes  README.md, between the comments <!-- uar and <!-- /uar -->
"""

import re
from pathlib import Path

from chest.core.files import write_text
from chest.core.runtime import parser, run_tool

README, CARD = Path("README.md"), Path("metrics/model_card.md")


def main() -> None:
    parser(__doc__).parse_args()
    readme = README.read_text(encoding="utf-8")
    write_text(README, fill(readme, CARD.read_text(encoding="utf-8")))


def fill(readme: str, card: str) -> str:
    """Return `readme` with the UAR table of `card` between its marks."""
    table = re.search(r"^\| UAR \|.*?\n(?=\n)", card, re.DOTALL | re.MULTILINE)[0]
    marks = r"(<!-- uar: .*? -->\n).*?(<!-- /uar -->)"
    return re.sub(marks, lambda found: found[1] + table + found[2], readme, flags=re.DOTALL)


if __name__ == "__main__":
    run_tool(main)
