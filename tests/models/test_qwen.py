"""Qwen2.5-VL: prompt, image tokens, likelihoods and free answers, on the tiny checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from support import ROOT, require_shared
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from chest.core.errors import ParameterError
from chest.core.labels import LABELS
from chest.core.params import Params, load_params
from chest.models.common.checkpoints import CheckpointError, Source, find_checkpoint
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.qwen import (
    AskedRows,
    QwenModel,
    QwenPrompts,
    QwenSettings,
    _load_chat_template,
    answer_likelihoods,
    ask_rows,
    generate_answers,
    image_inputs,
    load_qwen,
    parse_answer,
    prepare_question,
    prompt_ids,
    visual_tokens,
)

QUESTION = "This is a frontal chest X-ray. COVID-19, tuberculosis or normal?"
ANSWERS = ("COVID-19", "normal", "tuberculosis")
PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.qwen", QwenPrompts)
SETTINGS = PARAMS.system("zeroshot_qwen", QwenSettings)


def load(folder, side=112, precision="fp64"):
    return load_qwen(start(0, precision), find_checkpoint(str(folder), "main"), side)


@pytest.fixture(scope="module")
def qwen(checkpoints):
    return load(checkpoints / "qwen")


@pytest.fixture(scope="module")
def talkative(checkpoints):
    """With larger weights it says something, and not the same of each image."""
    qwen = load(checkpoints / "qwen")
    with torch.no_grad():
        for weights in qwen.model.parameters():
            if weights.ndim > 1:
                weights.mul_(5)
    return qwen


# --- Inputs ----------------------------------------------------------------------------------


def test_the_prompt_is_the_checkpoints_own_with_places_for_the_image(qwen):
    ids = prompt_ids(qwen, QUESTION)
    assert ids.count(qwen.model.config.image_token_id) == 16
    assert visual_tokens(qwen.model.config, 224) == 64
    text = qwen.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>{QUESTION}" in text


def test_patches_are_those_of_the_familys_own_preprocessor(qwen, images):
    # Its limits are pinned to the image's own size, so that it resizes nothing.
    process = Qwen2VLImageProcessorPil(
        min_pixels=112 * 112,
        max_pixels=112 * 112,
        image_mean=qwen.normalization.mean,
        image_std=qwen.normalization.std,
    )
    pictures = [Image.fromarray(image).convert("RGB") for image in images.numpy()]
    theirs = process(images=pictures, return_tensors="pt")
    ours = image_inputs(qwen, images)
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    expected = theirs["pixel_values"].double()
    torch.testing.assert_close(ours["pixel_values"], expected, atol=1e-5, rtol=0)


# --- Likelihood ------------------------------------------------------------------------------


def plain_likelihood(qwen, image, answer):
    """Prompt and answer in one sequence through transformers' own forward."""
    prompt = prompt_ids(qwen, QUESTION)
    said = [*qwen.tokenizer(answer)["input_ids"], qwen.tokenizer.eos_token_id]
    ids = torch.tensor([prompt + said])
    with torch.inference_mode():
        logits = qwen.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == qwen.model.config.image_token_id).int(),
            **image_inputs(qwen, image[None]),
        ).logits[0]
    logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return sum(logs[i, token].item() for i, token in enumerate(said))


def likelihoods(qwen, images, answers=ANSWERS):
    return answer_likelihoods(qwen, images, prepare_question(qwen, QUESTION, answers))


# 280 px: smaller windows at the border than inside.
@pytest.mark.parametrize("side", [112, 280])
def test_a_score_is_the_log_likelihood_of_the_answer(checkpoints, side):
    qwen = load(checkpoints / "qwen", side)
    drawn = np.random.default_rng(1).integers(0, 256, (2, side, side), dtype=np.uint8)
    images = torch.from_numpy(drawn)
    scores = likelihoods(qwen, images)
    assert scores.dtype == torch.float64
    expected = [[plain_likelihood(qwen, image, answer) for answer in ANSWERS] for image in images]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)  # norms compute in fp32
    assert (scores[0] - scores[1]).abs().min() > 1e-3  # they do differ by image


def test_bf16_gives_about_the_same(checkpoints, images):
    exact = likelihoods(load(checkpoints / "qwen"), images)
    AcceleratorState._reset_state(reset_partial_state=True)
    qwen = load(checkpoints / "qwen", precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert qwen.model.dtype == torch.bfloat16
    rough = likelihoods(qwen, images)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, atol=0.5, rtol=0)


# --- Free text -------------------------------------------------------------------------------


def test_free_answers_of_a_batch_do_not_influence_each_other(talkative):
    images = torch.stack([torch.full((112, 112), 30 * i, dtype=torch.uint8) for i in range(8)])
    many = generate_answers(talkative, images, QUESTION, 6)
    assert many == [generate_answers(talkative, image[None], QUESTION, 6)[0] for image in images]
    assert len(set(many)) > 2


def test_decoding_is_greedy_whatever_the_checkpoint_says(checkpoints, talkative, images, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other = load(folder)
    other.model.load_state_dict(talkative.model.state_dict())
    said = [generate_answers(qwen, images, QUESTION, 6) for qwen in (other, talkative)]
    assert said[0] == said[1]


def test_an_answer_names_one_class_or_none():
    answers = PROMPTS.answers.model_dump()
    meant = {
        "covid19": ["COVID-19", "covid 19.", "It is COVID19!"],
        "normal": ["**normal**\n", "normal, normal"],
        "tuberculosis": ["Answer:tuberculosis"],
        None: ["abnormal", "normally", "COVID-190", "COVID-19 or tuberculosis", "pneumonia", ""],
    }
    for label, texts in meant.items():
        assert {parse_answer(text, answers) for text in texts} == {label}


@pytest.mark.parametrize("method", ["likelihood", "generate"])
def test_rows_are_asked_in_the_words_of_their_modality(qwen, images, monkeypatch, method):
    def generate(qwen, images, question, _):
        return ["COVID-19" if "CT slice" in question else "no idea" for _ in images]

    monkeypatch.setattr("chest.models.qwen.generate_answers", generate)
    rows, modalities = np.array([4, 0, 3]), np.array(["ct", "xray", "ct"])
    asked = AskedRows(place_images(images.numpy(), torch.device("cpu")), rows, modalities)
    settings = SETTINGS.model_copy(update={"method": method, "batch_size": 2})
    found = ask_rows(start(0, "fp64"), qwen, asked, PROMPTS, settings)
    if method == "generate":
        assert found == [[1.0, 0.0, 0.0], None, [1.0, 0.0, 0.0]]
        return
    answers = [getattr(PROMPTS.answers, label) for label in LABELS]
    for row, modality, probabilities in zip(rows, modalities, found, strict=True):
        question = prepare_question(qwen, PROMPTS.ask(modality), answers)
        alone = answer_likelihoods(qwen, images[row][None], question).softmax(1)[0]
        np.testing.assert_allclose(probabilities, alone, atol=1e-6)


# --- Checkpoints and prompts -----------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "{% if", "{{ raise_exception('no') }}", "no image"])
def test_a_chat_template_that_is_missing_or_fails_is_told(checkpoints, tmp_path, template):
    folder = shutil.copytree(checkpoints / "qwen", tmp_path / "qwen")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=f"(?s){folder}.*chat template"):
        prompt_ids(load(folder), QUESTION)


def test_the_real_tokenizer_and_template_give_the_prompt():
    source = Source(str(require_shared("tokenizers") / "qwen2.5-vl-3b"), "main", None)
    tokenizer, config = source.load_tokenizer(), source.load_config(Qwen2_5_VLConfig)
    model = type("Model", (), {"config": config})
    template = _load_chat_template(source, tokenizer)
    qwen = QwenModel(source, model, tokenizer, template, None, 224)
    ids = prompt_ids(qwen, PROMPTS.ask("ct"))
    assert ids.count(config.image_token_id) == 64
    assert "an axial chest CT slice" in tokenizer.decode(ids)
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    "change",
    [
        {"question": "Which one?"},
        {"question": "{modality} {modality}?"},
        {"answers": {"covid19": "abnormal", "normal": "normal", "tuberculosis": "TB"}},
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(change):
    content = {"prompts": {"qwen": PROMPTS.model_dump() | change}}
    with pytest.raises(ParameterError, match=r"needs \{modality\} once|part of another"):
        Params(content, "phantom", 0).section("prompts.qwen", QwenPrompts)
