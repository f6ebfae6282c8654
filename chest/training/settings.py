"""Settings of a fine-tuning: a block of ``params.yaml`` for each trained system."""

from typing import Annotated, Literal

from pydantic import Field

from chest.core.params import Count, Positive, Section, Text

Degrees = Annotated[float, Field(ge=0, le=180, allow_inf_nan=False)]
Half = Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Augment(Section):
    """Largest random changes of a training image."""

    rotate: Degrees
    shift: Half  # share of the side
    scale: Half
    contrast: BelowOne


class TrainingSettings(Section):
    """What ``params.yaml`` says about each key."""

    checkpoint: Text
    revision: Text
    image_size: Positive
    lr: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    warmup_steps: Count
    batch_size: Positive
    epochs: Positive
    weight_decay: BelowOne
    balance: Literal["none", "class", "class_modality", "logit_adjusted"]
    augment: Augment | None
    select_by: Literal["within", "uar", "worst"]
    calibrate: Literal["none", "temperature"]
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"]
    save_every: Positive
