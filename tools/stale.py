"""List the stages whose committed results are not those of the code and parameters beside them.

Reads   dvc.yaml, dvc.lock, params.yaml and code; data only if they are there
Prints  each stale stage with its line and the reason; the exit code is 1 if there is one

    python tools/stale.py
    python tools/stale.py --annotate        # also as annotations of dvc.yaml on GitHub
"""

from chest.core.errors import ChestError
from chest.core.runtime import parser, run_tool
from chest.reporting.staleness import StaleStage, stale_stages

REMEDY = "Run `dvc repro`, then commit dvc.lock, metrics/ and plots/ together with the change."


def main(arguments: list[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--annotate", action="store_true", help="print GitHub workflow commands")
    options = command.parse_args(arguments)
    stages = stale_stages()
    if options.annotate:
        for stage in stages:
            print(annotation(stage))
    if stages:
        lines = [f"  {s.file}:{s.line}: {s.name}: {s.reason}" for s in stages]
        raise ChestError("\n".join(["stale stages:", *lines, REMEDY]))
    print("No stage is stale: dvc.lock belongs to the code and the parameters.")


def annotation(stage: StaleStage) -> str:
    """Return the workflow command for a stage: an error, or a warning if it only follows one."""
    kind = "error" if stage.changed else "warning"
    title = escape(f"{stage.name} is stale").replace(":", "%3A").replace(",", "%2C")
    text = escape(f"{stage.reason}. {REMEDY}")
    return f"::{kind} file={stage.file},line={stage.line},title={title}::{text}"


def escape(text: str) -> str:
    """Escape the characters that end a workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


if __name__ == "__main__":
    run_tool(main)
