"""Statistics of batch norms: estimated once on training images, then fixed.

A network that is trained with the statistics of its batches is tested with others: balanced batches
do not look like the images to classify, and with several processes each has its own. With fixed
statistics training and inference compute the same function, for any number of processes.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from chest.models.common.classification import ImageRows
from chest.models.common.pixels import to_pixels

IMAGES = 512  # that the statistics are estimated on, drawn evenly from the training images
BATCH_SIZE = 64


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether `model` holds a batch norm."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def estimate_statistics(model: nn.Module, data: ImageRows) -> None:
    """Set the statistics of the batch norms of `model` to those of images as they occur.

    Every process computes the same, on IMAGES of the rows of `data`, in evaluation mode otherwise.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    chosen = data.rows[np.linspace(0, len(data.rows) - 1, min(IMAGES, len(data.rows)), dtype=int)]
    dtype = next(model.parameters()).dtype
    # Shuffled, since the images are sorted by collection: each batch is to look like all of them.
    shuffled = np.random.default_rng(0).permutation(chosen)
    for start in range(0, len(shuffled), BATCH_SIZE):
        images = data.images.take(shuffled[start : start + BATCH_SIZE])
        model(pixel_values=to_pixels(images, data.normalization, dtype=dtype))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
