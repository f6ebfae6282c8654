"""Vision encoders of transformers, each as an image classifier with a new head.

Whatever the family, the pooled features of an encoder are the input of its classifier's head: the
mean of the patches (SigLIP), class token (ViT), both (DINOv2), or the pooled feature map (CNNs).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from transformers import (
    ConvNextV2ForImageClassification,
    Dinov2ForImageClassification,
    EfficientNetForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetForImageClassification,
    SiglipForImageClassification,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from chest.core.errors import ParameterError, printable
from chest.core.labels import LABELS
from chest.core.params import Positive, Section, Text
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.checkpoints import Source
from chest.models.common.classification import Head, head_labels, logits_and_features
from chest.models.common.device import float_type
from chest.models.common.folding import prepare_for_inference
from chest.models.common.image_store import ImageStore
from chest.models.common.pixels import (
    Normalization,
    check_image_size,
    load_normalization,
    to_pixels,
)
from chest.models.common.views import View

Pooling = Literal["mean", "attention"]
CNNS = ("convnextv2", "efficientnet", "resnet")
SMALLEST = 32  # px: a CNN halves the side five times


class AttentionPooledSiglip(SiglipForImageClassification):
    """SigLIP's classifier on its own attention pooling instead of the mean of the patches."""

    def forward(self, pixel_values: torch.Tensor, **options) -> ImageClassifierOutput:
        outputs = self.vision_model(pixel_values, **options)
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutput(logits=logits, attentions=outputs.attentions)


@dataclass(frozen=True)
class Family:
    """How checkpoints of a model_type are loaded.

    ``classifier``: the class of the model; ``head``: the name of its last layer; ``unused``:
    prefixes of weights that checkpoints of the family hold and the classifier does not have.
    """

    classifier: type[PreTrainedModel]
    head: str = "classifier"
    unused: tuple[str, ...] = ()


# SigLIP includes SigLIP 2 of fixed resolution and MedSigLIP; DINOv2 includes RAD-DINO.
FAMILIES = {
    "convnextv2": Family(ConvNextV2ForImageClassification),
    "dinov2": Family(Dinov2ForImageClassification),
    "efficientnet": Family(EfficientNetForImageClassification),
    "resnet": Family(ResNetForImageClassification, head="classifier.1"),
    "siglip": Family(
        SiglipForImageClassification, unused=("text_model.", "logit_scale", "logit_bias")
    ),
    "vit": Family(ViTForImageClassification, unused=("pooler.", "vit.pooler.")),
}
POOLING_HEAD = "vision_model.head."  # of SigLIP: its attention pooling


class EncoderSettings(Section):
    """A frozen encoder's block in params.yaml."""

    checkpoint: Text
    revision: Text
    image_size: Positive
    pooling: Pooling = "mean"
    batch_size: Positive
    view: View


def load_classifier(
    source: Source,
    image_size: int,
    dtype: torch.dtype = torch.float32,
    pooling: Pooling = "mean",
    head: Head = "shared",
    random: bool = False,
) -> PreTrainedModel:
    """Load the encoder of `source` with a new head; see `head_labels`.

    `pooling` concerns SigLIP only. If `random`, only the configuration is read, and all weights are
    new. Raises CheckpointError for a family that is not in FAMILIES, before its weights are
    fetched, and for damaged weights; ParameterError if it cannot read images of `image_size` px.
    """
    config = load_config(source, image_size)
    if config.model_type == "siglip":
        config.vision_config.vision_use_head = pooling == "attention"
    config.update(head_labels(head))
    classifier = classifier_of(config)
    if random:
        config.random_weights = True
        return classifier._from_config(config, dtype=dtype)
    family = FAMILIES[config.model_type]
    unused = (*family.unused, POOLING_HEAD) if pooling == "mean" else family.unused
    new = (f"{family.head}.weight", f"{family.head}.bias")
    return source.load_model(classifier, new=new, unused=unused, config=config, dtype=dtype)


def load_trained(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a classifier that `save_classifier` wrote, for inference.

    Raises CheckpointError if it is no classifier of LABELS.
    """
    config = source.load_config(FAMILIES[model_type(source)].classifier.config_class)
    head = getattr(config, "head", "shared")
    if config.id2label != head_labels(head)["id2label"]:
        raise source.error(f"it is no classifier of {', '.join(LABELS)}")
    return source.load_model(classifier_of(config), config=config, dtype=dtype).eval()


def model_type(source: Source) -> str:
    """Return the model_type of an encoder; raises CheckpointError unless it is in FAMILIES."""
    found = source.load_dict(PreTrainedConfig.get_config_dict).get("model_type")
    if found not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise source.error(f"its model_type is {printable(found)}, expected one of {known}")
    return found


def classifier_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the classifier that `config` describes."""
    if config.model_type == "siglip" and config.vision_config.vision_use_head:
        return AttentionPooledSiglip
    return FAMILIES[config.model_type].classifier


def load_config(source: Source, image_size: int) -> PreTrainedConfig:
    """Load the configuration of an encoder that reads images of `image_size` px."""
    found = model_type(source)
    config = source.load_config(FAMILIES[found].classifier.config_class)
    if found in ("siglip", "vit"):
        check_image_size(getattr(config, "vision_config", config).image_size, image_size)
    elif found == "dinov2" and image_size % config.patch_size:
        raise ParameterError(
            f"image_size: {image_size}, but the checkpoint reads patches of {config.patch_size} px"
        )
    elif found in CNNS and image_size < SMALLEST:
        raise ParameterError(f"image_size: {image_size}, but a CNN needs {SMALLEST} px")
    return config


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder on its device, in evaluation mode."""

    model: PreTrainedModel
    normalization: Normalization


def load_encoder(
    accelerator: Accelerator, source: Source, image_size: int, pooling: Pooling = "mean"
) -> Encoder:
    """Load a frozen encoder on the device; raises what `load_classifier` does."""
    model = load_classifier(source, image_size, float_type(accelerator), pooling)
    model = prepare_for_inference(model.eval()).to(accelerator.device)
    return Encoder(model, load_normalization(source))


def extract(
    accelerator: Accelerator,
    encoder: Encoder,
    images: ImageStore,
    rows: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Return the pooled features of `rows`, int64 (n,), of `images`: float64 (n, d)."""
    dtype = float_type(accelerator)

    def function(batch: np.ndarray) -> torch.Tensor:
        pixels = to_pixels(images.take(batch), encoder.normalization, dtype=dtype)
        with accelerator.autocast():
            return logits_and_features(encoder.model, pixels)[1].to(dtype)

    answers = infer(accelerator, in_batches(rows, batch_size), function)
    return np.array([answers[row] for row in rows.tolist()], dtype=np.float64)
