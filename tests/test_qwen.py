"""Qwen2.5-VL: prompt, image tokens, scores and answers, on the tiny checkpoint."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import ROOT
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from chest.compute import CheckpointError, find_checkpoint, start
from chest.errors import ParameterError
from chest.params import load_params
from chest.qwen import (
    answer_likelihoods,
    generate_answers,
    image_inputs,
    image_tokens,
    load_reader,
    parse_answer,
    pose,
    prompt_ids,
    visual_tokens,
)

QUESTION = "This is a frontal chest X-ray. COVID-19, tuberculosis or normal?"
ANSWERS = ("COVID-19", "normal", "tuberculosis")
PROMPTS = load_params(ROOT / "params.yaml").prompts.qwen


def load(folder, side=224):
    return load_reader(find_checkpoint(str(folder), "main"), side, start(0))


@pytest.fixture(scope="module")
def reader(checkpoints):
    return load(checkpoints / "qwen")


@pytest.fixture(scope="module")
def talkative(checkpoints):
    """With larger weights it says something, and not the same of each image."""
    reader = load(checkpoints / "qwen")
    with torch.no_grad():
        for weights in reader.model.parameters():
            if weights.ndim > 1:
                weights.mul_(3)
    return reader


@pytest.fixture(scope="module")
def images():
    drawn = np.random.default_rng(0).integers(0, 256, (8, 224, 224)).astype(np.uint8)
    return torch.from_numpy(drawn)


def test_the_prompt_is_the_checkpoints_own_with_64_places_for_the_image(reader):
    ids = prompt_ids(reader, QUESTION)
    assert (
        ids.count(reader.model.config.image_token_id)
        == visual_tokens(reader.model.config, 224)
        == 64
    )
    text = reader.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert f"<|vision_start|>{'<|image_pad|>' * 64}<|vision_end|>{QUESTION}" in text


@pytest.mark.parametrize("side", [223, 216, 230])
def test_a_side_that_the_model_would_resize_is_refused_before_weights_are_read(
    checkpoints, tmp_path, side
):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(checkpoints / "qwen" / name, tmp_path)
    with pytest.raises(ParameterError, match="multiple of 28"):
        load(tmp_path, side)


def test_patches_are_those_of_the_familys_own_preprocessor(reader, images):
    # Its limits are pinned to the image's own size, so that it resizes nothing.
    process = Qwen2VLImageProcessorPil(
        min_pixels=224 * 224,
        max_pixels=224 * 224,
        image_mean=reader.normalization.mean,
        image_std=reader.normalization.std,
    )
    pictures = [Image.fromarray(image).convert("RGB") for image in images.numpy()]
    theirs = process(images=pictures, return_tensors="pt")
    ours = image_inputs(reader, images)
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-5, rtol=0)


# 280 px: windows of 2 x 2 tokens at the border, beside those of 4 x 4.
@pytest.mark.parametrize("side", [224, 280])
def test_the_vision_tower_gives_what_transformers_gives(checkpoints, side):
    reader = load(checkpoints / "qwen", side)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, side, side)))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoints / "qwen").eval()
    assert plain.model.visual.blocks[0].attn.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        inputs = image_inputs(reader, images.to(torch.uint8))
        theirs = plain.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        ours = image_tokens(reader, images.to(torch.uint8))
    assert theirs.pooler_output.std() > 1e-3
    torch.testing.assert_close(ours.flatten(0, 1), theirs.pooler_output, atol=1e-5, rtol=1e-4)


def naive_likelihood(reader, image, answer):
    """Prompt and answer in one sequence, as one would score it without any trick."""
    prompt = prompt_ids(reader, QUESTION)
    said = [*reader.tokenizer(answer)["input_ids"], reader.tokenizer.eos_token_id]
    ids = torch.tensor([prompt + said])
    kinds = (ids == reader.model.config.image_token_id).int()
    with torch.inference_mode():
        logits = reader.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
            **image_inputs(reader, image[None]),
        ).logits[0].log_softmax(-1)  # fmt: skip
    places = range(len(prompt) - 1, len(prompt) - 1 + len(said))
    return sum(logits[place, token].item() for place, token in zip(places, said, strict=True))


def likelihoods(reader, images, answers=ANSWERS):
    return answer_likelihoods(reader, images, pose(reader, QUESTION, answers))


def test_an_answers_score_is_its_log_likelihood(reader, images):
    scores = likelihoods(reader, images[:2])
    for i, j in np.ndindex(2, 3):
        assert scores[i, j].item() == pytest.approx(
            naive_likelihood(reader, images[i], ANSWERS[j]), abs=1e-4
        )


def test_other_answers_do_not_change_an_answers_score(reader, images):
    both = likelihoods(reader, images[:1])
    alone = likelihoods(reader, images[:1], ANSWERS[2:])
    torch.testing.assert_close(both[:, 2:], alone, atol=1e-5, rtol=0)


def test_images_of_a_batch_do_not_influence_each_other(reader, images):
    together = likelihoods(reader, images)
    apart = torch.cat([likelihoods(reader, i[None]) for i in images])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert (together.std(0) > 1e-5).all()  # they do differ by image
    others = images.clone()
    others[1:] = 255 - others[1:]
    first = likelihoods(reader, others)[:1]
    torch.testing.assert_close(together[:1], first, atol=1e-5, rtol=0)


def test_free_answers_of_a_batch_do_not_influence_each_other(talkative):
    images = torch.stack([torch.full((224, 224), 30 * i, dtype=torch.uint8) for i in range(8)])
    together = generate_answers(talkative, images, QUESTION, 6)
    assert together == [generate_answers(talkative, i[None], QUESTION, 6)[0] for i in images]
    assert len(set(together)) > 2


def test_decoding_is_greedy_whatever_the_checkpoint_says(checkpoints, images, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    asked = [generate_answers(load(folder), images, QUESTION, 6) for _ in range(2)]
    assert asked[0] == asked[1]
    assert asked[0] == generate_answers(load(checkpoints / "qwen"), images, QUESTION, 6)


def test_a_checkpoint_without_a_chat_template_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    (folder / "chat_template.json").unlink()
    with pytest.raises(CheckpointError, match="chat template"):
        load(folder)


@pytest.mark.parametrize(
    "template",
    ["{% if", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ a.b.c }}", 3, {"default": "x"}],
)
def test_a_chat_template_that_fails_is_told(checkpoints, tmp_path, template):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=f"{folder}.* chat template"):
        prompt_ids(load(folder), QUESTION)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model.safetensors", "", "weights"),
        ("model.safetensors", "PK" * 99, "weights"),
        ("config.json", "[]", r"config\.json"),
        ("config.json", "{}", r"config\.json"),
        ("chat_template.json", "[]", "chat template"),
        ("tokenizer_config.json", "[]", "tokenizer"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("preprocessor_config.json", "{}", r"preprocessor_config\.json"),
    ],
)
def test_a_file_of_another_content_is_refused(checkpoints, tmp_path, file, content, told):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{folder} .*{told}"):
        load(folder)


def test_a_tokenizer_that_fails_is_told(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["tokenizer_class"] = "BertTokenizer"  # it has no token for words that it does not know
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{folder}.* tokenizer"):
        prompt_ids(load(folder), QUESTION)


@pytest.mark.parametrize(
    ("tower", "key"), [("text_config", "num_hidden_layers"), ("vision_config", "depth")]
)
def test_weights_that_the_config_leaves_out_are_refused(checkpoints, tmp_path, tower, key):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    content = json.loads((folder / "config.json").read_text())
    content[tower][key] = 1
    content[tower].pop("layer_types", None)  # older files do not have it
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="of its weights have no place in"):
        load(folder)


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [
        ("vision_config", "patch_size", 0),
        ("vision_config", "spatial_merge_size", 0),
        ("vision_config", "window_size", 1),
        ("vision_config", "num_heads", 3),
        ("text_config", "rope_parameters", None),
        ("text_config", "num_attention_heads", 0),
    ],
)
def test_settings_that_fit_no_weights_are_refused(checkpoints, tmp_path, tower, key, value):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    content = json.loads((folder / "config.json").read_text())
    content[tower][key] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{folder} .*config\.json"):
        load(folder)


def test_weights_of_other_versions_names_are_no_foreign_ones(checkpoints, reader, images, tmp_path):
    # Files have the names of an older transformers, as the hub's; a newer one may write its own.
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    weights = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"visual", "model"}
    own = {"visual": "model.visual", "model": "model.language_model"}
    renamed = {re.sub(r"^\w+", lambda m: own[m[0]], name): x for name, x in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(likelihoods(load(folder), images), likelihoods(reader, images))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("COVID-19", "covid19"),
        ("covid 19.", "covid19"),
        ("It is COVID19!", "covid19"),
        ("Normal", "normal"),
        ("**normal**\n", "normal"),
        ("Answer:tuberculosis", "tuberculosis"),
        ("TUBERCULOSIS", "tuberculosis"),
        ("normal, normal", "normal"),
        ("abnormal", None),
        ("normally", None),
        ("COVID-190", None),
        ("COVID-19 or tuberculosis", None),
        ("COVID-19, tuberculosis or normal", None),
        ("pneumonia", None),
        ("", None),
    ],
)
def test_an_answer_names_one_class_or_none(said, meant):
    assert parse_answer(said, PROMPTS.answers.model_dump()) == meant
