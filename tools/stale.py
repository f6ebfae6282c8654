"""Say which stages of the pipeline are stale: their results are not those of the code beside them.

Reads   what Git tracks (chest/staleness.py); no data are needed
Prints  each stale stage with its line and the reason; exit code 1 if there is one

    python tools/stale.py
    python tools/stale.py --annotate        # as GitHub shows it beside the lines of dvc.yaml
"""

import argparse
from collections.abc import Iterable

from chest.commands import parser
from chest.errors import ChestError, run
from chest.staleness import StaleStage, stale_stages

REMEDY = "Run `dvc repro`, then commit dvc.lock, metrics/ and plots/ together with the change."


class StaleError(ChestError):
    """Stale stages; the message names each."""

    def __init__(self, stages: Iterable[StaleStage]):
        lines = [f"  {s.file}:{s.line}: {s.name}: {s.why}" for s in stages]
        count = "a stage is stale" if len(lines) == 1 else f"{len(lines)} stages are stale"
        super().__init__("\n".join([f"{count}:", *lines, REMEDY]))


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    stages = stale_stages()
    if options.annotate:
        for stage in stages:
            print(annotation(stage))
    if stages:
        raise StaleError(stages)
    print("No stage is stale: dvc.lock belongs to the code and the parameters.")


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    command.add_argument("--annotate", action="store_true", help="print GitHub's workflow commands")
    return command.parse_args(arguments)


def annotation(stage: StaleStage) -> str:
    """The workflow command that shows a stale stage on its line: an error where it begins."""
    kind = "error" if stage.reasons else "warning"
    properties = {"file": stage.file, "line": str(stage.line), "title": f"{stage.name} is stale"}
    listed = ",".join(
        f"{key}={escape(value).replace(':', '%3A').replace(',', '%2C')}"
        for key, value in properties.items()
    )
    return f"::{kind} {listed}::{escape(f'{stage.why}. {REMEDY}')}"


def escape(text: str) -> str:
    """`text` as the value of a workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


if __name__ == "__main__":
    run(main)
