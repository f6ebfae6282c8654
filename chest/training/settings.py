"""Fine-tuning settings: a block of ``params.yaml`` for each trained system."""

from typing import Annotated, Literal

from pydantic import Field

from chest.core.params import Count, Positive, Section, Text


class Augment(Section):
    """Largest random changes of a training image."""

    rotate: Annotated[float, Field(ge=0, le=180, allow_inf_nan=False)]  # degrees
    shift: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]  # share of the side
    scale: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)]
    contrast: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class TrainingSettings(Section):
    """Fine-tuning settings; ``params.yaml`` documents each."""

    checkpoint: Text
    revision: Text
    image_size: Positive
    lr: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    warmup_steps: Count
    batch_size: Positive
    epochs: Positive
    weight_decay: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    balance: Literal["none", "class", "class_modality", "logit_adjusted"]
    augment: Augment | None
    select_by: Literal["within", "uar", "worst"]
    calibrate: Literal["none", "temperature"]
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"]
    save_every: Positive
