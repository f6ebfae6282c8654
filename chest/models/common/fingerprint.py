"""Digests of all that a result depends on: only if none has changed is interrupted work resumed."""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from chest.data.dataset import IMAGES, MANIFEST, SPLIT
from chest.models.common.checkpoints import Source
from chest.models.common.device import LIBRARIES, device_name, precision_name

# Neither Git nor DVC tracks it: unfinished work is no result.
RESUME_FOLDER = Path(".resume")

Fingerprint = dict[str, str]


def fingerprint(
    accelerator: Accelerator, source: Source, image_size: int, parameters: dict
) -> Fingerprint:
    """Return a digest of each thing that a stage's result depends on, by name.

    `parameters` are those that the stage reads, `image_size` is the side of its images in px. The
    main process reads the files on behalf of all processes.
    """
    found = None
    if accelerator.is_main_process:
        found = {
            "parameters": hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
            "images": _digest([MANIFEST, IMAGES / f"{image_size}.npy"]),
            "split": _digest([SPLIT]),
            "weights": f"{source} {source.commit or _digest(_files(Path(source.checkpoint)))}",
            "code": _digest(_loaded_code()),
            "machine": _machine(accelerator),
        }
    return broadcast_object_list([found])[0]


def differences(found: object, expected: Fingerprint) -> str:
    """Return the names of the digests that differ, separated by commas; empty if none does."""
    if not isinstance(found, dict):
        return "everything"
    return ", ".join(name for name in expected if found.get(name) != expected[name])


def _machine(accelerator: Accelerator) -> str:
    libraries = [version(library) for library in LIBRARIES]
    device, precision = device_name(accelerator), precision_name(accelerator)
    return f"{device} x {accelerator.num_processes}, {precision}, {libraries}"


def _loaded_code() -> list[Path]:
    """Return the files of the loaded modules of ``chest`` and of the running script."""
    modules = [module for name, module in sys.modules.items() if name.startswith("chest.")]
    paths = {Path(module.__file__) for module in modules} | {Path(sys.argv[0])}
    return sorted(path for path in paths if path.is_file())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(files: list[Path]) -> str:
    """Return the SHA-256 of the contents of `files`, one after the other."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
