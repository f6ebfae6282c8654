"""Packed images, on the model's device if they fit, otherwise read ahead from a memory map."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from chest.models.common.views import View, show, unpack

SHARE = 0.25  # of the device's free memory, for images; the rest is for weights and activations
EVERYTHING = View()


@dataclass(frozen=True)
class ImageStore:
    """uint8 grey images (N, side, side) for `device`, shown through `view`.

    ``source`` is on the device itself or, if they do not fit, a memory map on the CPU. So are
    ``masks``, the packed lung masks (N, side, ceil(side / 8)) that some views need.
    """

    source: torch.Tensor
    device: torch.device
    masks: torch.Tensor | None = None
    view: View = EVERYTHING

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Return the images of `rows`, int64 (B,), on the device: uint8 (B, side, side)."""
        return self._show(torch.from_numpy(rows).to(self.source.device))

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
                yield self._show(part)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.take, batches[0])
            for batch in batches[1:]:
                ready, ahead = ahead, pool.submit(self.take, batch)
                yield ready.result()
            yield ahead.result()

    def _show(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the images of `rows`, which are where the source is, through the view."""
        masks = None if self.masks is None else unpack(self._to_device(self.masks[rows]))
        return show(self._to_device(self.source[rows]), masks, self.view)

    def _to_device(self, batch: torch.Tensor) -> torch.Tensor:
        if batch.device == self.device:
            return batch
        if self.device.type == "cuda":  # so that the host does not wait for the copy
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)


def place_images(
    images: np.ndarray,
    device: torch.device,
    masks: np.ndarray | None = None,
    view: View = EVERYTHING,
) -> ImageStore:
    """Put `images`, uint8 (N, side, side), on `device` if they fit into SHARE of its free memory.

    The packed `masks` that `view` needs, uint8 (N, side, ceil(side / 8)), go with them. On the CPU
    they stay memory maps, which the operating system caches as far as there is room.
    """
    arrays = [images] if masks is None else [images, masks]
    tensors = [torch.from_numpy(array) for array in arrays]
    if _fits(sum(array.nbytes for array in arrays), device):
        tensors = [tensor.to(device) for tensor in tensors]
        device = tensors[0].device  # its device has a number: cuda is not cuda:0
    return ImageStore(tensors[0], device, *tensors[1:], view=view)


def _fits(size: int, device: torch.device) -> bool:
    return device.type == "cuda" and size <= SHARE * torch.cuda.mem_get_info(device)[0]
