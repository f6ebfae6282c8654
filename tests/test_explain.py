"""What an answer depends on: measured by taking it away, and the picture of it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import SiglipConfig, SiglipForImageClassification, SiglipModel

from chest.compute import Normalization, start, to_pixels
from chest.explain import draw_look, look_of_classifier, look_of_prompts, pool
from chest.siglip import classify, score

PATCH, GRID = 8, 8
N = GRID**2
NORMAL = Normalization((0.5,) * 3, (0.5,) * 3)


def draw(count, rng):
    """Noise with a bright square in one patch, a dark one, or none: images, classes, patches."""
    images = rng.normal(110, 12, (count, GRID * PATCH, GRID * PATCH))
    classes, patches = rng.integers(0, 3, count), rng.integers(0, N, count)
    for image, kind, patch in zip(images, classes, patches, strict=True):
        y, x = PATCH * np.array(divmod(patch, GRID))
        image[y + 1 : y + PATCH - 1, x + 1 : x + PATCH - 1] += (90, 0, -90)[kind]
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), classes, patches


TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "image_size": GRID * PATCH, "patch_size": PATCH,
}  # fmt: skip
TEXTS = torch.eye(3, 32)  # stands for the embeddings of the classes' prompts


def learn(model, parameters, scores, steps):
    """Train `parameters` on what the squares mean; `scores` gives logits of pixels."""
    optimizer, rng = torch.optim.AdamW(parameters, lr=3e-3), np.random.default_rng(0)
    for _ in range(steps):
        images, classes, _ = draw(32, rng)
        loss = cross_entropy(scores(to_pixels(images, NORMAL)), torch.tensor(classes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def classifier():
    start(0)
    config = SiglipConfig(vision_config=TOWER | {"vision_use_head": False}, num_labels=3)
    model = SiglipForImageClassification(config)
    return learn(model, model.parameters(), lambda pixels: model(pixel_values=pixels).logits, 130)


@pytest.fixture(scope="module")
def prompted():
    """A tower whose places see their own patch alone: only the pooling tells where it looked."""
    start(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    config = SiglipConfig(vision_config=TOWER | {"num_hidden_layers": 1}, text_config=text)
    model = SiglipModel(config)
    model.logit_scale.data.fill_(2)
    mixing = model.vision_model.encoder.layers[0].self_attn.out_proj
    mixing.weight.data.zero_()
    learned = [p for n, p in model.vision_model.named_parameters() if "self_attn" not in n]
    return learn(model, learned, lambda pixels: score(model, pixels, TEXTS).log(), 220)


@pytest.fixture(params=["classifier", "prompted"])
def explained(request):
    """Two functions of images and classes: the probabilities, and what they depend on."""
    model = request.getfixturevalue(request.param)

    @torch.inference_mode()
    def probability(images, classes):
        if request.param == "classifier":
            answers = classify(start(0), model, images, NORMAL).softmax(1)
        else:
            answers = score(model, to_pixels(images, NORMAL), TEXTS)
        return answers.numpy()[np.arange(len(images)), classes]

    def look(images, classes):
        pixels = to_pixels(images, NORMAL)
        if request.param == "classifier":
            return look_of_classifier(model, pixels, classes)
        return look_of_prompts(model, pixels, TEXTS, classes)

    return probability, look


@pytest.fixture(scope="module")
def marked():
    """Unseen images with a square, their classes and where it is."""
    images, classes, patches = draw(48, np.random.default_rng(1))
    shown = classes != 1
    return images[shown], classes[shown], patches[shown]


def without(images, patches):
    """`images` with the patches, (n, k), of each replaced by its mean."""
    hidden = np.zeros((len(images), N), bool)
    np.put_along_axis(hidden, patches, True, axis=1)
    hidden = hidden.reshape(-1, GRID, GRID).repeat(PATCH, 1).repeat(PATCH, 2)
    mean = images.float().mean((1, 2), keepdim=True).byte()
    return torch.where(torch.from_numpy(hidden), mean, images)


def test_removing_what_is_marked_takes_the_answer_away(explained, marked):
    probability, look = explained
    images, classes, _ = marked
    assert probability(images, classes).mean() > 0.9
    order = np.argsort(-look(images, classes).reshape(-1, N), axis=1)
    rng = np.random.default_rng(2)
    for count in (1, 4):
        other = np.array([rng.permutation(N)[:count] for _ in images])
        assert probability(without(images, order[:, :count]), classes).mean() < 0.3
        assert probability(without(images, other), classes).mean() > 0.8
    # The less marked half of the image does not matter.
    assert probability(without(images, order[:, N // 2 :]), classes).mean() > 0.8


def test_what_is_marked_is_where_the_finding_is(explained, marked):
    images, classes, patches = marked
    found = explained[1](images, classes)
    assert found.shape == (len(images), GRID, GRID)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert (found.reshape(-1, N).argmax(1) == patches).mean() > 0.9


def test_an_image_is_explained_alike_alone_and_among_others(explained, marked):
    images, classes, _ = marked
    together = explained[1](images[:5], classes[:5])
    alone = explained[1](images[3:4], classes[3:4])
    np.testing.assert_allclose(alone[0], together[3], rtol=1e-3, atol=1e-6)


def test_explaining_leaves_the_answers_as_they_are(explained, marked, classifier):
    probability, look = explained
    images, classes, _ = marked
    kind, before = classifier.config._attn_implementation, probability(images, classes)
    look(images, classes)
    assert classifier.config._attn_implementation == kind
    assert np.array_equal(probability(images, classes), before)


def test_pooling_is_that_of_the_model(prompted, marked):
    with torch.no_grad():
        output = prompted.vision_model(pixel_values=to_pixels(marked[0], NORMAL))
        vectors, paid = pool(prompted.vision_model.head, output.last_hidden_state)
    torch.testing.assert_close(vectors, output.pooler_output)
    assert paid.shape == (len(marked[0]), 4, 1, N)
    torch.testing.assert_close(paid.sum(-1), torch.ones(len(marked[0]), 4, 1))


# --- The picture -----------------------------------------------------------------------------


def test_the_picture_shows_input_and_what_is_marked(tmp_path):
    image = np.full((224, 224), 128, np.uint8)
    look = np.zeros((8, 8), np.float32)
    look[2, 5] = 3e-4
    for name in ("a", "b"):
        draw_look(tmp_path / f"{name}.png", image, look, "COVID-19, 97.1 %", "$x$_1.png", "Notice")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        rgb = np.asarray(picture.convert("RGB")).astype(int)
    assert rgb.shape[1] > 800
    # In the right one of two grey pictures one patch is coloured, and in its place.
    grey = (rgb == 128).all(2)
    top, bottom = np.flatnonzero(grey.sum(1) > 300)[[0, -1]]  # not what letters blur
    columns = np.flatnonzero(grey.sum(0) > 300)
    left, right = columns[np.flatnonzero(np.diff(columns) > 5)[-1] + 1], columns[-1]
    side = (right + 1 - left) / 8
    inside = np.ptp(rgb, axis=2)[top : bottom + 1, left : right + 1] > 30
    rows, columns = np.nonzero(inside)
    found = np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1])
    assert np.abs(found - side * np.array([2, 3, 5, 6])).max() < 3
    assert inside.sum() > 0.9 * side**2


def test_a_look_of_zeros_is_drawn(tmp_path):
    draw_look(tmp_path / "a.png", np.eye(16, dtype=np.uint8), np.zeros((2, 2), np.float32), *"abc")
    assert (tmp_path / "a.png").stat().st_size > 1000
