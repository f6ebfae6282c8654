"""Training states on disk, from which an interrupted training resumes.

They lie in .resume/<system>/, which neither Git nor DVC tracks: a state is no result.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chest.core.files import remove, replacing
from chest.models.common.device import saving
from chest.models.common.fingerprint import WORK, Fingerprint, differences

KEPT = 2  # if the newest state cannot be read, the one before it serves


@dataclass(frozen=True)
class States:
    """The states of a system's training, one safetensors file each; the newest KEPT stay.

    Only states with this `fingerprint` are resumed from: it names all that the result depends on.
    """

    system: str
    fingerprint: Fingerprint

    @property
    def folder(self) -> Path:
        return WORK / self.system

    def save(self, step: int, state: dict) -> None:
        """Save `state`: nested dicts and lists of tensors and of what JSON can hold."""
        tensors: dict[str, torch.Tensor] = {}

        def set_aside(tensor: torch.Tensor) -> dict:
            name = str(len(tensors))
            tensors[name] = tensor.contiguous()
            return {"tensor": name}

        text = {
            "fingerprint": json.dumps(self.fingerprint),
            "state": json.dumps(state, default=set_aside),
        }
        with replacing(self.folder / f"step-{step:08}.safetensors") as path, saving(self.folder):
            save_file(tensors, path, metadata=text)
        for path in self._found()[:-KEPT]:
            remove(path)

    def load(self) -> dict | None:
        """Return the newest state of this fingerprint, or None; a line says why one is not used.

        Tensors are on the CPU. All keys are strings, and all sequences lists.
        """
        for path in reversed(self._found()):
            try:
                with safe_open(path, "pt") as file:
                    text = file.metadata()
                    changed = differences(json.loads(text["fingerprint"]), self.fingerprint)
                    if not changed:
                        return json.loads(text["state"], object_hook=partial(_fetch, file))
                reason = f"changed since: {changed}"
            except (OSError, SafetensorError) as error:
                reason = f"cannot be read: {error}"
            print(f"{path}: not resumed from, {reason}", file=sys.stderr)
        return None

    def clear(self) -> None:
        """Remove all states: the stage is done."""
        remove(self.folder)

    def _found(self) -> list[Path]:
        """Return the states, oldest first; those of an earlier training may have higher steps."""
        states = self.folder.glob("step-*.safetensors")
        return sorted(states, key=lambda path: path.stat().st_mtime_ns)


def _fetch(file: safe_open, part: dict) -> object:
    """Return the tensor for which `part` stands; any other part as it is."""
    return file.get_tensor(part["tensor"]) if "tensor" in part else part
