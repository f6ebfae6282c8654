"""Run every stage with a model on a GPU, or on a stand-in for one, and say how each case ended.

    python tests/gpu/cases.py FOLDER                 all cases
    python tests/gpu/cases.py FOLDER features ...    some

A process of its own, since the stand-in replaces parts of PyTorch for good. Writes found.json:
for each case what it found, or the traceback of its failure under ``error``.
"""

import json
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "training", TESTS / "gpu"))

# ruff: noqa: E402, I001
from stand_in import on_device  # before PyTorch is used

from accelerate.state import AcceleratorState
from support import load_script

import classifiers  # noqa: F401  adds its cases
import language  # noqa: F401
from harness import CASES, Patch, case_of


@case_of
def benchmarks(patch: Patch) -> dict:
    """What `make gpu` measures, of a few images."""
    parts = ("systems", "training", "zeroshot")
    load_script("benchmarks/run.py").main(
        ["--tiny", "--only", *parts, "--commit", "x", "--name", "tiny", "--into", str(patch.folder)]
    )
    found = json.loads((patch.folder / "tiny.json").read_text())
    return {"device": found["device"], "rows": len(found["rows"]), "systems": len(found["systems"])}


def main(folder: Path, *names: str) -> None:
    make = load_script("data/make_checkpoints.py")
    makers = {name: getattr(make, f"make_{name}") for name in ("qwen", "qwen3")}
    makers |= {
        "siglip": lambda path: make.make_siglip(path, 32, 8),
        "medgemma": make.make_gemma,
        "resnet50": lambda path: make.make_resnet(path, 32),
        "efficientnet_b0": lambda path: make.make_efficientnet(path, 32),
    }
    for family, make_checkpoint in makers.items():
        (folder / family).mkdir(parents=True)
        make_checkpoint(folder / family)
    found = {}
    for name in names or CASES:
        began = time.process_time()
        AcceleratorState._reset_state(reset_partial_state=True)
        patch = Patch(folder / f"case-{name}", folder)
        try:
            with on_device():
                found[name] = CASES[name](patch)
        except (Exception, SystemExit):
            found[name] = {"error": traceback.format_exc()}
        finally:
            patch.undo()
        print(
            f"{name}: {time.process_time() - began:.1f} s of the processor",
            file=sys.stderr,
            flush=True,
        )
    (folder / "found.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
