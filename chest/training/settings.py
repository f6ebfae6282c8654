"""Settings of the training loop, part of a block of ``params.yaml`` for each trained system."""

from typing import Annotated, Literal

from pydantic import Field

from chest.core.params import Count, Positive, Section


class Augment(Section):
    """Largest random changes of a training image."""

    rotate: Annotated[float, Field(ge=0, le=180, allow_inf_nan=False)]  # degrees
    shift: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]  # share of the side
    scale: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]
    contrast: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    # Of control points a third of the side apart, as a share of the side; at 0.1 tissue would fold.
    elastic: Annotated[float, Field(ge=0, lt=0.1, allow_inf_nan=False)] = 0.0
    gamma: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0  # 1: from 1/2 to 2


class LoopSettings(Section):
    """Settings of the training loop; ``params.yaml`` documents each."""

    image_size: Positive
    lr: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    warmup_steps: Count
    batch_size: Positive
    micro_batch: Positive | None = None
    epochs: Positive
    epoch_steps: Positive | None = None  # None: as many as it takes to see every image
    weight_decay: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    augment: Augment | None
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"]
    save_every: Positive
