"""SigLIP by prompts and as a classifier: what is loaded, tokenized, scored and saved."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import BESIDE, ROOT
from transformers import AutoTokenizer, SiglipForImageClassification, SiglipModel

from chest.compute import CheckpointError, find_checkpoint, load_normalization, start, to_pixels
from chest.errors import ParameterError
from chest.labels import LABELS
from chest.params import load_params
from chest.siglip import (
    class_embeddings,
    classify,
    load_classifier,
    load_for_prompts,
    load_trained,
    save_classifier,
    score,
    tokenize,
)

REAL_TOKENIZER = BESIDE / "tokenizers" / "siglip"
PROMPTS = load_params(ROOT / "params.yaml").prompts.siglip.model_dump()


@pytest.fixture(scope="module")
def source(checkpoints):
    return find_checkpoint(str(checkpoints / "siglip"), "main")


@pytest.fixture(scope="module")
def both(source):
    return load_for_prompts(source, 224)


@pytest.fixture(scope="module")
def images():
    drawn = np.random.default_rng(0).integers(0, 256, (5, 224, 224)).astype(np.uint8)
    return torch.from_numpy(drawn)


# --- Prompts ---------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_TOKENIZER.is_dir(), reason=f"no tokenizer in {REAL_TOKENIZER}")
def test_the_real_tokenizer_cuts_no_prompt():
    tokenizer = AutoTokenizer.from_pretrained(REAL_TOKENIZER)
    for prompt in [p for prompts in PROMPTS.values() for p in prompts]:
        ids = tokenize(tokenizer, [prompt])[0]
        read = tokenizer.decode(ids, skip_special_tokens=True)
        # SigLIP's tokenizer lowers letters and drops punctuation.
        letters = [c for c in prompt.lower() if c.isalnum()]
        assert [c for c in read.lower() if c.isalnum()] == letters
        assert ids[-1] == tokenizer.pad_token_id  # with room to spare


def test_prompts_are_padded_to_64_tokens(both):
    ids = tokenize(both[1], ["lungs", "a chest X-ray of a patient"])
    assert ids.shape == (2, 64)
    assert ids.dtype == torch.int64
    assert (ids[:, -1] == both[1].pad_token_id).all()


def test_a_prompt_that_would_be_cut_is_refused(both):
    with pytest.raises(ParameterError, match=r"prompts.siglip: .* at most 64"):
        tokenize(both[1], ["lungs", "lungs " * 80])


def test_a_class_is_the_mean_of_its_prompts(both):
    model, tokenizer = both
    classes = class_embeddings(model, tokenizer, PROMPTS)
    assert classes.shape == (3, 96)
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(3))
    with torch.inference_mode():
        texts = [
            model.get_text_features(tokenize(tokenizer, [prompt])).pooler_output[0]
            for prompt in PROMPTS["normal"]
        ]
    mean = torch.stack([text / text.norm() for text in texts]).mean(0)
    torch.testing.assert_close(classes[LABELS.index("normal")], mean / mean.norm())


def test_scores_rank_the_classes_as_the_models_own_logits_do(both, source, images):
    model, tokenizer = both
    pixels = to_pixels(images, load_normalization(source))
    one = {label: prompts[:1] for label, prompts in PROMPTS.items()}
    ids = tokenize(tokenizer, [one[label][0] for label in LABELS])
    with torch.inference_mode():
        scores = score(model, pixels, class_embeddings(model, tokenizer, one))
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(scores, logits.softmax(1))
    torch.testing.assert_close(scores.sum(1), torch.ones(5))


def test_cosines_are_not_taken_in_bf16(both, source, images):
    model, tokenizer = both
    pixels = to_pixels(images, load_normalization(source))
    classes = class_embeddings(model, tokenizer, PROMPTS)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scores = score(model, pixels, classes)
        features = model.get_image_features(pixels).pooler_output.double()
    cosines = features / features.norm(dim=1, keepdim=True) @ classes.double().T
    expected = (cosines * model.logit_scale.double().exp()).softmax(1)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


# --- Classifier ------------------------------------------------------------------------------


def test_the_classifier_has_the_checkpoints_vision_tower_and_a_new_head(source, checkpoints):
    model = load_classifier(source, 224)
    stored = load_file(checkpoints / "siglip" / "model.safetensors")
    names = dict(model.named_parameters())
    head = {"classifier.weight", "classifier.bias"}
    assert head <= set(names)
    assert names["classifier.weight"].shape == (3, 96)
    for name in set(names) - head:
        assert torch.equal(names[name], stored[name]), name
    assert not any("text_model" in name for name in names)
    assert [model.config.id2label[i] for i in range(3)] == list(LABELS)


def test_all_of_its_parameters_learn(source, images):
    # One without a gradient would stop training on several GPUs.
    model = load_classifier(source, 224)
    pixels = to_pixels(images, load_normalization(source))
    model(pixel_values=pixels).logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_seed_decides_the_new_head(source):
    heads = []
    for seed in (1, 1, 2):
        start(seed)
        heads.append(load_classifier(source, 224).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_what_is_saved_loads_and_answers_alike(source, images, tmp_path):
    accelerator = start(1)
    model, normal = load_classifier(source, 224).eval(), load_normalization(source)
    save_classifier(model, normal, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = SiglipForImageClassification.from_pretrained(tmp_path).eval()
    stored = load_normalization(find_checkpoint(str(tmp_path), "main"))
    assert stored == normal
    with torch.inference_mode():
        expected = classify(accelerator, model, images, normal)
        assert torch.equal(classify(accelerator, again, images, stored), expected)


# --- Checkpoints that will not do ------------------------------------------------------------


@pytest.mark.parametrize("load", [load_for_prompts, load_classifier])
def test_images_of_another_size_are_refused(source, load):
    with pytest.raises(ParameterError, match="224 px, but this is 256"):
        load(source, 256)


@pytest.mark.parametrize("load", [load_for_prompts, load_classifier])
def test_a_checkpoint_that_lacks_weights_is_refused(checkpoints, tmp_path, load):
    folder = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "vision_model.encoder.layers.1" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights of"):
        load(find_checkpoint(str(folder), "main"), 224)


LOADERS = {
    "prompts": load_for_prompts,
    "classifier": load_classifier,
    "trained": load_trained,
}


@pytest.fixture
def folder(request, source, checkpoints, tmp_path):
    """A checkpoint that may be damaged: the tiny one, or what is saved of a classifier."""
    folder = tmp_path / "model"
    if request.node.callspec.params.get("name", "trained") != "trained":
        return shutil.copytree(checkpoints / "siglip", folder)
    save_classifier(load_classifier(source, 224), load_normalization(source), folder)
    return folder


def change(file, *keys, to):
    content = json.loads(file.read_text())
    *parents, last = keys
    section = content
    for parent in parents:
        section = section[parent]
    section[last] = to
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_damaged_weights_are_refused(folder, name, damage):
    path = folder / "model.safetensors"
    path.write_bytes({"truncated": path.read_bytes()[:-9], "empty": b""}.get(damage, b"PK" * 99))
    with pytest.raises(CheckpointError, match=rf"{folder} .* its weights .* fetch it again"):
        LOADERS[name](find_checkpoint(str(folder), "main"), 224)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("layers", [0, 1])
def test_weights_that_the_config_leaves_out_are_refused(folder, name, layers):
    change(folder / "config.json", "vision_config", "num_hidden_layers", to=layers)
    with pytest.raises(CheckpointError, match=r"of its weights have no place in .*encoder\.layers"):
        LOADERS[name](find_checkpoint(str(folder), "main"), 224)


@pytest.mark.parametrize("name", LOADERS)
def test_sizes_that_no_memory_holds_are_refused_before_they_are_allocated(folder, name):
    change(folder / "config.json", "vision_config", "hidden_size", to=20_000_000)
    with pytest.raises(CheckpointError, match="are not in it or have another shape"):
        LOADERS[name](find_checkpoint(str(folder), "main"), 224)


@pytest.mark.parametrize("name", ["prompts", "classifier"])
def test_buffers_that_older_versions_saved_are_no_foreign_weights(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    LOADERS[name](find_checkpoint(str(folder), "main"), 224)


@pytest.mark.parametrize("name", ["prompts", "classifier"])
def test_outputs_have_names_whatever_the_config_says(folder, name, images):
    for keys in (["return_dict"], ["vision_config", "return_dict"], ["text_config", "return_dict"]):
        change(folder / "config.json", *keys, to=False)
    source = find_checkpoint(str(folder), "main")
    pixels = to_pixels(images, load_normalization(source))
    if name == "classifier":
        assert load_classifier(source, 224)(pixel_values=pixels).logits.shape == (5, 3)
    else:
        model, tokenizer = load_for_prompts(source, 224)
        classes = class_embeddings(model, tokenizer, PROMPTS)
        with torch.inference_mode():
            assert score(model, pixels, classes).shape == (5, 3)


@pytest.mark.parametrize(
    "classes",
    [
        LABELS[:1],
        LABELS[:2],
        LABELS[::-1],
        (*LABELS, "pneumonia"),
        LABELS * 2,
        ("covid19", "normal", "Tuberculosis"),
    ],
)
def test_a_classifier_of_other_classes_is_refused(source, tmp_path, classes):
    config = load_classifier(source, 224).config
    config.id2label = dict(enumerate(classes))
    model = SiglipForImageClassification(config)
    assert model.classifier.out_features == len(classes)
    save_classifier(model, load_normalization(source), tmp_path)
    with pytest.raises(CheckpointError, match="no classifier of covid19, normal, tuberc"):
        load_trained(find_checkpoint(str(tmp_path), "main"), 224)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_head_of_another_width_is_refused(folder, width):
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].repeat(*[2] * weights[name].ndim)[:width].clone()
    weights["classifier.weight"] = weights["classifier.weight"][:, :96].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2 weights of .* have another shape"):
        load_trained(find_checkpoint(str(folder), "main"), 224)


@pytest.mark.parametrize("token", ["eos_token", "pad_token"])
def test_a_tokenizer_without_end_or_padding_is_refused(checkpoints, tmp_path, token):
    folder = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip")
    change(folder / "tokenizer_config.json", token, to=None)
    with pytest.raises(CheckpointError, match="no end token, or none for padding"):
        load_for_prompts(find_checkpoint(str(folder), "main"), 224)


def test_a_tokenizer_of_a_larger_model_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip")
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(9, 96)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", "text_config", "vocab_size", to=9)
    model, tokenizer = load_for_prompts(find_checkpoint(str(folder), "main"), 224)
    with pytest.raises(CheckpointError, match=f"{folder}: its tokenizer is another model's"):
        class_embeddings(model, tokenizer, PROMPTS)


def test_pickled_weights_are_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "siglip", tmp_path / "siglip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert SiglipModel.from_pretrained(folder)  # transformers would take them
    with pytest.raises(CheckpointError, match="safetensors"):
        load_for_prompts(find_checkpoint(str(folder), "main"), 224)
