"""Training states in .resume/<system>/, from which an interrupted training resumes."""

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
from chest.models.common.fingerprint import RESUME_FOLDER, Fingerprint, differences

KEPT = 2  # the older one is used if the newest cannot be read


@dataclass(frozen=True)
class States:
    """The saved states of a system's training: one safetensors file each, the newest KEPT.

    Only states with the same `fingerprint`, of all that the result depends on, are loaded.
    """

    system: str
    fingerprint: Fingerprint

    @property
    def folder(self) -> Path:
        return RESUME_FOLDER / self.system

    def save(self, step: int, state: dict) -> None:
        """Save `state`: nested dicts and lists of tensors and JSON values."""
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
        """Return the newest state with this fingerprint, or None; print why others are not used.

        Tensors are on the CPU, all keys are strings, and all sequences are lists.
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
        """Remove all states, once the stage is done."""
        remove(self.folder)

    def _found(self) -> list[Path]:
        """Return the states by age, oldest first: steps of an earlier training may be higher."""
        states = self.folder.glob("step-*.safetensors")
        return sorted(states, key=lambda path: path.stat().st_mtime_ns)


def _fetch(file: safe_open, part: dict) -> object:
    """Return the tensor that `part` refers to, and any other part unchanged."""
    return file.get_tensor(part["tensor"]) if "tensor" in part else part
