"""Encoders of all families: loading, checks, features, heads."""

import numpy as np
import pytest
import torch
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2Model,
    EfficientNetImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from chest.core.errors import ParameterError
from chest.models.common.checkpoints import CheckpointError, find_checkpoint
from chest.models.common.classification import (
    PAIRS,
    ImageRows,
    class_logits,
    classify_rows,
    head_of,
    save_classifier,
)
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import Normalization, load_normalization
from chest.models.encoders import Encoder, extract, load_classifier, load_encoder, load_trained

GREY = Normalization((0.5,) * 3, (0.5,) * 3)
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
OTHERS = {
    "vit": lambda: ViTModel(ViTConfig(**TINY, intermediate_size=16, patch_size=14)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, patch_size=14)),
    "convnextv2": lambda: ConvNextV2ForImageClassification(
        ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=1000)
    ),
}
SIDES = {"siglip": 112, "resnet50": 64, "efficientnet_b0": 64, "convnextv2": 56}


@pytest.fixture(scope="module")
def accelerator():
    return start(0, "fp32")


def images_of(side, count=3):
    rng = np.random.default_rng(0)
    return place_images(rng.integers(0, 256, (count, side, side), np.uint8), torch.device("cpu"))


@pytest.fixture(params=["siglip", "resnet50", "efficientnet_b0", *OTHERS])
def family(request, checkpoints, tmp_path):
    """The checkpoint of an encoder and the side of its images."""
    folder = checkpoints / request.param
    if request.param in OTHERS:
        folder = tmp_path / request.param
        torch.manual_seed(0)
        OTHERS[request.param]().save_pretrained(folder)
        content = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        (folder / "preprocessor_config.json").write_text(content)
    return find_checkpoint(str(folder), "main"), SIDES.get(request.param, 28)


def test_the_features_are_the_input_of_the_head_and_do_not_depend_on_the_batch(family, accelerator):
    source, side = family
    model, images = load_classifier(source, side).eval(), images_of(side)
    encoder = Encoder(model, GREY)
    features = extract(accelerator, encoder, images, np.arange(3), batch_size=3)
    alone = extract(accelerator, encoder, images, np.array([2, 0]), batch_size=1)
    assert features.shape == (3, head_of(model).in_features)
    assert features.std(axis=0).max() > 0
    assert np.allclose(alone, features[[2, 0]], atol=1e-5)
    logits = classify_rows(accelerator, model, ImageRows(images, np.arange(3), GREY), 3)
    own = head_of(model)(torch.from_numpy(features).float()).detach().numpy()
    assert np.allclose(own, logits, atol=1e-5)


def test_the_weights_are_those_of_the_checkpoint_and_only_the_head_is_new(family):
    source, side = family
    first, second = load_classifier(source, side), load_classifier(source, side)
    head = head_of(second).weight
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        if not name.startswith("classifier") and other is not head:
            assert torch.equal(one, other), name
    assert head.shape[0] == 3
    assert head.std() > 0


def test_it_comes_back_from_its_folder(family, accelerator, tmp_path):
    source, side = family
    model, data = load_classifier(source, side, head="by_modality"), images_of(side)
    rows = ImageRows(data, np.arange(3), GREY, np.array([0, 1, 1]))
    due = classify_rows(accelerator, model, rows, 2)
    save_classifier(model, GREY, side, tmp_path / "saved")
    saved = find_checkpoint(str(tmp_path / "saved"), "main")
    found = classify_rows(accelerator, load_trained(saved), rows, 2)
    assert np.allclose(found, due, atol=1e-6)
    assert load_normalization(saved) == GREY


def test_attention_pooling_is_the_embedding_of_siglip(checkpoints, accelerator, tmp_path):
    source = find_checkpoint(str(checkpoints / "siglip"), "main")
    encoder = load_encoder(accelerator, source, 112, "attention")
    features = extract(accelerator, encoder, images_of(112), np.arange(3), 3)
    model = SiglipModel.from_pretrained(checkpoints / "siglip").eval()
    pixels = (images_of(112).source[:, None].expand(-1, 3, -1, -1).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        due = model.get_image_features(pixels).pooler_output.numpy()
    assert np.allclose(features, due, atol=1e-5)
    save_classifier(encoder.model, GREY, 112, tmp_path)
    assert type(load_trained(find_checkpoint(str(tmp_path), "main"))) is type(encoder.model)
    mean = load_encoder(accelerator, source, 112, "mean")
    assert not np.allclose(extract(accelerator, mean, images_of(112), np.arange(3), 3), due)


def test_random_weights_are_new_and_said_to_be(checkpoints):
    source = find_checkpoint(str(checkpoints / "resnet50"), "main")
    torch.manual_seed(1)
    model = load_classifier(source, 64, random=True)
    first = next(load_classifier(source, 64).parameters())
    assert not torch.equal(first, next(model.parameters()))
    assert model.config.random_weights


def test_another_family_is_refused_before_its_weights_are_read(checkpoints, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="model_type is bert, expected one of convnext"):
        load_classifier(find_checkpoint(str(tmp_path), "main"), 64)


def test_a_side_that_the_encoder_cannot_read(family):
    source, _ = family
    with pytest.raises(ParameterError, match="image_size: 30"):
        load_classifier(source, 30)


def test_efficientnet_is_normalized_as_its_own_processor_does(checkpoints):
    folder = checkpoints / "efficientnet_b0"
    processor = EfficientNetImageProcessorPil.from_pretrained(folder, do_resize=False)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    due = processor(image, return_tensors="np")["pixel_values"][0]
    normalization = load_normalization(find_checkpoint(str(folder), "main"))
    own = (image / 255 - normalization.mean) / normalization.std
    assert np.allclose(own.transpose(2, 0, 1), due, atol=1e-4)


@pytest.mark.parametrize("head", ["masked", "by_modality"])
def test_the_class_that_does_not_occur_in_a_modality_gets_no_probability(head):
    outputs = torch.arange(8.0).view(2, 4)[:, : 4 if head == "by_modality" else 3]
    found = class_logits(outputs, head, torch.tensor([0, 1])).softmax(1)
    assert (found == 0).tolist() == [[False, False, True], [True, False, False]]
    assert torch.allclose(found.sum(1), torch.ones(2))


def test_heads_by_modality_share_no_output():
    assert len(PAIRS) == 4
    outputs = torch.arange(8.0).view(2, 4)
    ct, xray = class_logits(outputs, "by_modality", torch.tensor([0, 1])).tolist()
    assert ct[:2] == [0.0, 1.0]
    assert xray[1:] == [6.0, 7.0]
