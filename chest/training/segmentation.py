"""What the training of the lung segmentation minimises, and how its epochs are compared."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import nn

from chest.data.masks import dice, resize_mask, unpack
from chest.models.common.batch_inference import in_batches
from chest.models.common.device import float_type
from chest.models.common.image_store import ImageStore
from chest.models.lungs import Channels, LungSegmenter, UNetConfig, standardize, to_grey
from chest.training.augmentation import change, warp
from chest.training.loop import Batch
from chest.training.selection import DECIMALS
from chest.training.settings import LoopSettings


class SegmentationSettings(LoopSettings):
    """Settings of segment_lungs; ``params.yaml`` documents each."""

    channels: list[Channels]

    @property
    def unet(self) -> UNetConfig:
        """The U-Net to train."""
        return UNetConfig(image_size=self.image_size, channels=self.channels)


@dataclass(frozen=True)
class Truth:
    """Published masks, packed, uint8 (M, side, ceil(side / 8)), of ``rows``, int64 (M,)."""

    rows: np.ndarray
    packed: np.ndarray

    def masks(self, rows: np.ndarray) -> np.ndarray:
        """Return the masks of `rows`, all of which have one: bool (n, side, side)."""
        return unpack(self.packed[np.searchsorted(self.rows, rows)])


@dataclass(frozen=True)
class Segmentation:
    """Dice and cross-entropy of the lungs; the epoch with the best Dice on validation is kept.

    ``validation``: rows with a published mask, int64 (n,).
    """

    segmenter: LungSegmenter
    images: ImageStore
    truth: Truth
    validation: np.ndarray
    batch_size: int

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of `batch`; masks move with their images."""
        accelerator = self.segmenter.accelerator
        dtype = float_type(accelerator)
        grey = to_grey(batch.images, self.segmenter.config.image_size, dtype)
        masks = self.targets[self.places[batch.rows]].to(dtype)[:, None]
        if batch.changes is not None:
            grey, masks = change(grey, batch.changes), warp(masks, batch.changes)
        with accelerator.autocast():
            logits = model(standardize(grey))
        return self.criterion(logits.to(dtype), masks)

    def validate(self) -> dict[str, float]:
        """Return val_loss and val_dice, the mean Dice coefficient."""
        self.segmenter.model.eval()
        losses, scores = [], []
        for rows in in_batches(self.validation, self.batch_size):
            places = torch.from_numpy(rows).to(self.images.device)
            batch = Batch(self.images.take(rows), places, changes=None, progress=1.0)
            with torch.inference_mode():
                losses += [self.loss(self.segmenter.model, batch).item()] * len(rows)
            found = self.segmenter.segment(batch.images)
            scores += [dice(*pair) for pair in zip(found, self.truth.masks(rows), strict=True)]
        return {"val_loss": float(np.mean(losses)), "val_dice": float(np.mean(scores))}

    def best_epoch(self, curve: list[dict]) -> int:
        """Return the epoch with the highest val_dice, of equal ones the first."""
        return max(curve, key=lambda row: round(row["val_dice"], DECIMALS))["epoch"]

    @cached_property
    def criterion(self) -> nn.Module:
        return DiceCELoss(sigmoid=True)

    @cached_property
    def targets(self) -> torch.Tensor:
        """The published masks at the side of the U-Net, uint8 (M, size, size), on the device."""
        size = self.segmenter.config.image_size
        masks = [resize_mask(mask, size) for mask in unpack(self.truth.packed)]
        return torch.from_numpy(np.stack(masks).astype(np.uint8)).to(self.images.device)

    @cached_property
    def places(self) -> torch.Tensor:
        """Which of the targets belongs to each row up to the last that has one, on the device."""
        places = np.full(self.truth.rows.max() + 1, -1)
        places[self.truth.rows] = np.arange(len(self.truth.rows))
        return torch.from_numpy(places).to(self.images.device)
