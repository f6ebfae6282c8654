"""What the training of a diffusion model minimises: the error of the velocity that it predicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss

from chest.models.common.batch_inference import in_batches
from chest.models.common.device import float_type
from chest.models.common.image_store import ImageStore
from chest.models.diffusion import NULL, STEPS, Generator
from chest.training.augmentation import change
from chest.training.loop import Batch

NO_CLASS = 0.1  # share of training images whose class is hidden, so that NULL is learned


@dataclass(frozen=True)
class Denoising:
    """Mean squared error of the velocity at a random step (Ho et al. 2020, arXiv:2006.11239).

    The last epoch is kept: no image outside the training split decides anything. ``targets``: the
    class of each of ``images`` as its position in LABELS, int64 (N,). ``validation``: rows, int64.
    """

    generator: Generator
    images: ImageStore
    targets: np.ndarray
    validation: np.ndarray
    seed: int
    batch_size: int

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of `batch`.

        Noise, step and class of an image are drawn from the seed, the optimizer step and its row,
        whatever batch or process it is in.
        """
        rows = batch.rows.tolist()
        drawn = [np.random.default_rng([self.seed, batch.step, row]) for row in rows]
        steps = np.array([rng.integers(STEPS) for rng in drawn])
        hidden = [rng.random() < NO_CLASS for rng in drawn]
        classes = np.where(hidden, NULL, self.targets[rows])
        return self.error(model, batch, drawn, steps, classes)

    def validate(self) -> dict[str, float]:
        """Return val_loss, at the same steps and noise in every epoch."""
        unet, losses = self.generator.unet, []
        steps = (2 * np.arange(len(self.validation)) + 1) * STEPS // (2 * len(self.validation))
        for chosen in in_batches(np.arange(len(self.validation)), self.batch_size):
            rows = self.validation[chosen]
            drawn = [np.random.default_rng([self.seed, row]) for row in rows]
            batch = Batch(self.images.take(rows), torch.from_numpy(rows), None, progress=1.0)
            with torch.inference_mode():
                loss = self.error(unet, batch, drawn, steps[chosen], self.targets[rows])
            losses += [loss.item()] * len(rows)
        return {"val_loss": float(np.mean(losses))}

    def best_epoch(self, curve: list[dict]) -> int:
        """Return the last epoch."""
        return curve[-1]["epoch"]

    def error(
        self,
        model: nn.Module,
        batch: Batch,
        drawn: Sequence[np.random.Generator],
        steps: np.ndarray,
        classes: np.ndarray,
    ) -> torch.Tensor:
        """Return the mean squared error; the generators `drawn` give the noise."""
        pixels = batch.images.to(float_type(self.generator.accelerator))[:, None] / 255
        if batch.changes is not None:
            pixels = change(pixels, batch.changes)
        pixels = 2 * pixels - 1
        noise = np.stack([rng.standard_normal(pixels.shape[1:]) for rng in drawn])
        noise = torch.from_numpy(noise).to(pixels)
        steps, classes = (torch.from_numpy(x).to(pixels.device) for x in (steps, classes))
        noisy = self.generator.scheduler.add_noise(pixels, noise, steps)
        velocity = self.generator.scheduler.get_velocity(pixels, noise, steps)
        return mse_loss(self.generator.predict(model, noisy, steps, classes), velocity)
