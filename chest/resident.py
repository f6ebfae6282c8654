"""The packed images where the model computes: on the device where they fit, else read ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

SHARE = 0.25  # of the device's free memory that images may take: weights and activations follow


@dataclass(frozen=True)
class Images:
    """uint8 grey images, (N, side, side), for a `device`.

    ``source`` holds them: on the device itself, or, where they do not fit, on the CPU, a memory map
    from which batches are read.
    """

    source: torch.Tensor
    device: torch.device

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """The images of `rows`, int64 (B,), as uint8 (B, side, side) on the device."""
        return self._fetch(torch.from_numpy(rows))

    def stream(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """As `take`, for one batch of rows after the other.

        Nothing waits for the device: where the images live on it, all row numbers travel at once;
        where they do not, the next batch is read while this one is in use.
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

    def _fetch(self, rows: torch.Tensor) -> torch.Tensor:
        if self.source.device == self.device:
            return self.source[rows.to(self.device)]
        batch = self.source[rows]
        if self.device.type == "cuda":  # page-locked memory is copied while the device computes
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)


def place_images(images: np.ndarray, device: torch.device) -> Images:
    """`images`, uint8 (N, side, side), on `device` if they fit into SHARE of its free memory.

    On the CPU they stay the memory map that they are: the system keeps in memory what there is
    room for.
    """
    source = torch.from_numpy(images)
    if not _fits(images, device):
        return Images(source, device)
    source = source.to(device)
    return Images(source, source.device)  # which has a number: to PyTorch cuda is not cuda:0


def _fits(images: np.ndarray, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return images.nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]
