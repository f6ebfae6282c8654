"""What an answer depends on, measured by taking it away."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from chest.core.labels import LABELS, MODALITIES
from chest.models.common.classification import head_labels
from chest.models.common.device import start
from chest.models.common.pixels import Normalization, to_pixels
from chest.models.encoders import AttentionPooledSiglip
from chest.models.explain import relevance_of_classifier, relevance_of_prompts
from chest.models.siglip import PromptClassifier, compare

PATCH, GRID = 16, 4  # a square may be in any of 16 patches
PATCHES = GRID**2
NORMALIZATION = Normalization((0.5,) * 3, (0.5,) * 3)
SIZES = {"hidden_size": 32, "num_attention_heads": 4}
TOWER = SIZES | {"intermediate_size": 64, "image_size": GRID * PATCH, "patch_size": 8}
TEXTS = torch.eye(3, 32)  # stands for the embeddings of the classes' prompts
FAMILIES = {
    "siglip": (
        SiglipForImageClassification,
        SiglipConfig(vision_config=TOWER | {"num_hidden_layers": 2, "vision_use_head": False}),
    ),
    "attention_pooled": (
        AttentionPooledSiglip,
        SiglipConfig(vision_config=TOWER | {"num_hidden_layers": 1}),
    ),
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], embedding_size=16, layer_type="basic"),
    ),
}


def draw(count, rng):
    """Noise with a bright square in one patch, a dark one, or none: images, classes, patches."""
    images = rng.normal(110, 12, (count, GRID * PATCH, GRID * PATCH))
    classes, patches = rng.integers(0, 3, count), rng.integers(0, PATCHES, count)
    for image, kind, patch in zip(images, classes, patches, strict=True):
        y, x = PATCH * np.array(divmod(patch, GRID))
        image[y + 1 : y + PATCH - 1, x + 1 : x + PATCH - 1] += (90, 0, -90)[kind]
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), classes, patches


def learn(model, parameters, logits, steps):
    """Train `parameters` on what the squares mean."""
    optimizer, rng = torch.optim.AdamW(parameters, lr=3e-3), np.random.default_rng(0)
    for _ in range(steps):
        images, classes, _ = draw(32, rng)
        loss = cross_entropy(logits(images), torch.tensor(classes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def train_classifier(accelerator, family):
    kind, config = FAMILIES[family]
    config.update(head_labels("shared"))
    model = kind(config)

    def logits(images):
        return model(pixel_values=to_pixels(images, NORMALIZATION)).logits

    learn(model, model.parameters(), logits, 130)
    return model, lambda images: logits(images).softmax(1), relevance_of_classifier


def train_prompts(accelerator, _):
    """Tokens see their own patch alone: only the pooling tells where the model looked."""
    one = {"num_hidden_layers": 1}
    config = SiglipConfig(vision_config=TOWER | one, text_config=SIZES | one | {"vocab_size": 50})
    model = SiglipModel(config)
    model.logit_scale.data.fill_(2)
    model.vision_model.encoder.layers[0].self_attn.out_proj.weight.data.zero_()
    classifier = PromptClassifier(model, TEXTS.expand(2, -1, -1), NORMALIZATION)

    def probabilities(images):
        return compare(accelerator, classifier, images, ["ct"] * len(images))

    tower = [p for name, p in model.vision_model.named_parameters() if "self_attn" not in name]
    learn(model, tower, lambda images: probabilities(images).log(), 120)
    return model, probabilities, lambda *inputs: relevance_of_prompts(*inputs[:2], TEXTS, inputs[2])


def without(images, patches):
    """`images` with the patches, (n, k), of each replaced by its mean."""
    hidden = np.zeros((len(images), PATCHES), bool)
    np.put_along_axis(hidden, patches, True, axis=1)
    hidden = hidden.reshape(-1, GRID, GRID).repeat(PATCH, 1).repeat(PATCH, 2)
    mean = images.float().mean((1, 2), keepdim=True).byte()
    return torch.where(torch.from_numpy(hidden), mean, images)


@pytest.mark.parametrize("family", [*FAMILIES, "prompts"])
def test_removing_what_is_marked_takes_the_answer_away(family):
    train = train_prompts if family == "prompts" else train_classifier
    model, probabilities, relevance = train(start(0), family)
    images, classes, patches = draw(48, np.random.default_rng(1))
    images, classes, patches = (x[classes != 1] for x in (images, classes, patches))

    def left(removed):
        with torch.inference_mode():
            own = probabilities(without(images, removed))[range(len(classes)), classes]
        return own.mean().item()

    heat = relevance(model, to_pixels(images, NORMALIZATION), classes)
    assert heat.shape == (len(images), GRID, GRID)
    assert heat.min() >= 0
    order = np.argsort(-heat.reshape(-1, PATCHES), axis=1)
    assert (order[:, 0] == patches).mean() > 0.9
    others = (patches + np.random.default_rng(2).integers(1, PATCHES, len(images))) % PATCHES
    assert left(order[:, :1]) < 0.3
    assert left(others[:, None]) > 0.8
    assert left(order[:, PATCHES // 2 :]) > 0.8  # the less marked half does not matter
    alone = relevance(model, to_pixels(images[3:4], NORMALIZATION), classes[3:4])[0]
    np.testing.assert_allclose(alone, heat[3], rtol=1e-3, atol=1e-6)


def test_a_class_that_is_not_possible_takes_no_part():
    kind, config = FAMILIES["siglip"]
    config.update(head_labels("masked"))
    model = kind(config).eval()
    pixels = torch.randn(2, 3, GRID * PATCH, GRID * PATCH)
    classes = np.array([LABELS.index("covid19"), LABELS.index("normal")])
    modalities = np.full(2, MODALITIES.index("ct"))
    heat = relevance_of_classifier(model, pixels, classes, modalities)
    assert np.isfinite(heat).all()
    assert heat.max() > 0
    impossible = LABELS.index("tuberculosis")
    model.classifier.weight.data[impossible] *= 100
    again = relevance_of_classifier(model, pixels, classes, modalities)
    np.testing.assert_allclose(again, heat, rtol=1e-4, atol=1e-7)
