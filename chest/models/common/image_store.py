"""Packed images, on the model's device if they fit, otherwise read ahead from a memory map."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

SHARE = 0.25  # of the device's free memory, for images; the rest is for weights and activations


@dataclass(frozen=True)
class ImageStore:
    """uint8 grey images (N, side, side) for `device`.

    ``source`` is on the device itself or, if they do not fit, a memory map on the CPU.
    """

    source: torch.Tensor
    device: torch.device

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Return the images of `rows`, int64 (B,), on the device: uint8 (B, side, side)."""
        indices = torch.from_numpy(rows)
        if self.source.device == self.device:
            return self.source[indices.to(self.device)]
        batch = self.source[indices]
        if self.device.type == "cuda":  # pinned memory is copied while the device computes
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """Yield the images of each batch of rows, without waiting for the device.

        If the images are on the device, all row numbers are copied there at once. If not, the next
        batch is read while the current one is in use.
        """
        if not batches:
            return
        if self.source.device == self.device:
            rows = torch.from_numpy(np.concatenate(batches)).to(self.device)
            for part in rows.split([len(batch) for batch in batches]):
                yield self.source[part]
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.take, batches[0])
            for batch in batches[1:]:
                ready, ahead = ahead, pool.submit(self.take, batch)
                yield ready.result()
            yield ahead.result()


def place_images(images: np.ndarray, device: torch.device) -> ImageStore:
    """Put `images`, uint8 (N, side, side), on `device` if they fit into SHARE of its free memory.

    On the CPU they stay a memory map, which the operating system caches as far as there is room.
    """
    source = torch.from_numpy(images)
    if not _fits(images, device):
        return ImageStore(source, device)
    source = source.to(device)
    return ImageStore(source, source.device)  # its device has a number: cuda is not cuda:0


def _fits(images: np.ndarray, device: torch.device) -> bool:
    return device.type == "cuda" and images.nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]
