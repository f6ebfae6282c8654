"""The faster form of a network gives the same answers."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextV2Config,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ViTConfig,
)
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer

from chest.models.common.classification import logits_and_features
from chest.models.common.folding import prepare_for_inference
from chest.models.encoders import FAMILIES

SIDE = 64
CNN = {"depths": [1, 2], "hidden_sizes": [16, 32]}
CONFIGS = {
    "resnet": ResNetConfig(**CNN, embedding_size=16),
    "efficientnet": EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320
    ),
    "convnextv2": ConvNextV2Config(**CNN, num_stages=2),
    "vit": ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
    ),
}


def make(family):
    """Return a random classifier whose batch norms are no identities."""
    torch.manual_seed(0)
    model = FAMILIES[family].classifier(CONFIGS[family]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_(1, 0.2)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_features_are_the_same(family):
    model = make(family)
    before = copy.deepcopy(model.state_dict())
    fast = prepare_for_inference(model)
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with torch.inference_mode():
        for plain, new in zip(
            *(logits_and_features(m, pixels) for m in (model, fast)), strict=True
        ):
            torch.testing.assert_close(new, plain, rtol=1e-4, atol=1e-5 * plain.abs().max())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_gate_is_dropped_only_if_it_is_always_open():
    model = make("efficientnet")
    for block in model.efficientnet.encoder.blocks[1:]:
        block.squeeze_excite.expand.weight.data.zero_()
        block.squeeze_excite.expand.bias.data.fill_(30)
    fast = prepare_for_inference(model)
    kept = [m for m in fast.modules() if isinstance(m, EfficientNetSqueezeExciteLayer)]
    assert len(kept) == 1
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        plain, new = (m(pixel_values=pixels).logits for m in (model, fast))
    torch.testing.assert_close(new, plain, rtol=1e-4, atol=1e-5)


def test_a_float64_model_is_left_alone():
    model = EfficientNetForImageClassification(CONFIGS["efficientnet"]).double()
    assert prepare_for_inference(model) is model
