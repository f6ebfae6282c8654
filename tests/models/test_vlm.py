"""Vision-language models: prompt, images, likelihoods, free answers, on a tiny one per family."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from support import ROOT, require_shared
from transformers import Qwen2_5_VLConfig

from chest.core.errors import ParameterError
from chest.core.params import Params, load_params
from chest.models.common.checkpoints import CheckpointError, Source, find_checkpoint
from chest.models.common.device import start
from chest.models.vlm import likelihood
from chest.models.vlm.asking import VlmPrompts, covered, probabilities
from chest.models.vlm.families import FAMILIES
from chest.models.vlm.generation import generate_answers, parse_answer
from chest.models.vlm.likelihood import (
    answer_likelihoods,
    class_likelihoods,
    encode,
    linear,
    prepare_question,
)
from chest.models.vlm.model import (
    Vlm,
    _load_chat_template,
    end_of_turn,
    image_inputs,
    load_vlm,
    prompt_ids,
)

QUESTION = "This is a frontal chest X-ray. COVID-19, tuberculosis or normal?"
# Spellings that share their beginning, and one that is the beginning of another.
CLASSES = [["COVID-19", "COVID-19.", "COVID"], ["normal", "Normal"], ["tuberculosis"]]
PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.vlm", VlmPrompts)
NAMES = ("qwen", "qwen3", "medgemma")


def load(folder, side=112, precision="fp64"):
    return load_vlm(start(0, precision), find_checkpoint(str(folder), "main"), side)


@pytest.fixture(scope="module", params=NAMES)
def vlm(request, checkpoints):
    return load(checkpoints / request.param)


@pytest.fixture(scope="module")
def qwen(checkpoints):
    return load(checkpoints / "qwen")


@pytest.fixture(scope="module", params=NAMES)
def talkative(request, checkpoints):
    """With larger weights it says something, and not the same of each image."""
    vlm = load(checkpoints / request.param)
    with torch.no_grad():
        for weights in vlm.model.parameters():
            if weights.ndim > 1:
                weights.mul_({"medgemma": 1}.get(request.param, 5))
    return vlm


# --- Inputs ----------------------------------------------------------------------------------


def test_the_prompt_is_the_checkpoints_own_with_places_for_the_image(vlm):
    ids = prompt_ids(vlm, QUESTION)
    assert ids.count(vlm.config.image_token_id) == vlm.image_tokens == 16
    image = vlm.tokenizer.convert_ids_to_tokens(vlm.config.image_token_id) * 16
    start, middle, answer = {
        "qwen2_5_vl": (
            "<|im_start|>system\n",
            f"<|vision_start|>{image}<|vision_end|>",
            "assistant\n",
        ),
        "qwen3_vl": (
            "<|im_start|>system\n",
            f"<|vision_start|>{image}<|vision_end|>",
            "assistant\n",
        ),
        "gemma3": ("<bos>", f"\n\n<start_of_image>{image}<end_of_image>\n\n", "model\n"),
    }[vlm.config.model_type]
    text = vlm.tokenizer.decode(ids)
    assert text.startswith(start)
    assert f"{middle}{QUESTION}" in text
    assert text.endswith(answer)
    without = vlm.tokenizer.decode(prompt_ids(vlm, QUESTION, image=False))
    assert without == text.replace(middle, "")
    ended = vlm.tokenizer.convert_ids_to_tokens(end_of_turn(vlm))
    assert ended == {"gemma3": "<end_of_turn>"}.get(vlm.config.model_type, "<|im_end|>")


# 224 px are read as they are by Qwen and resized by Gemma, 120 px are resized by all.
@pytest.mark.parametrize("side", [112, 224, 120])
def test_inputs_are_those_of_the_familys_own_preprocessor(checkpoints, vlm, side):
    vlm = load(vlm.source.checkpoint, side)
    smooth = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    process = vlm.family.processor.from_pretrained(vlm.source.checkpoint)
    pictures = [Image.fromarray(image).convert("RGB") for image in smooth]
    theirs = process(images=pictures, return_tensors="pt")
    ours = image_inputs(vlm, torch.from_numpy(smooth))
    for name, values in ours.items():
        off = (values - theirs[name].to(values.dtype)).abs()
        # PIL resizes in whole numbers: a grey level may be one off where it is between two.
        assert off.max() < (1e-5 if side == vlm.side else 1.01 / 255 / min(vlm.normalization.std))
        assert (off > 1e-5).double().mean() < 0.005


def test_448_px_are_256_tokens(checkpoints):
    source = Source(str(require_shared("tokenizers") / "qwen2.5-vl-3b"), "main", None)
    family, config = FAMILIES["qwen2_5_vl"], source.load_config(Qwen2_5_VLConfig)
    processor = family.processor.from_pretrained(source.checkpoint)
    found = {side: family.image_tokens(config, family.side(processor, side)) for side in (224, 448)}
    assert found == {224: 64, 448: 256}


# --- Likelihood ------------------------------------------------------------------------------


def plain_likelihood(vlm, image, answer):
    """Prompt and answer in one sequence through transformers' own forward."""
    prompt = prompt_ids(vlm, QUESTION, image is not None)
    said = [*vlm.tokenizer(answer, add_special_tokens=False)["input_ids"], end_of_turn(vlm)]
    ids = torch.tensor([prompt + said])
    inputs = {}
    if image is not None:
        inputs = image_inputs(vlm, image[None])
        inputs[vlm.family.token_types] = (ids == vlm.config.image_token_id).int()
    with torch.inference_mode():
        logits = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
    logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return sum(logs[i, token].item() for i, token in enumerate(said))


def likelihoods(vlm, images, classes=CLASSES, **options):
    question = prepare_question(vlm, QUESTION, classes, images is not None, **options)
    with torch.inference_mode():
        return answer_likelihoods(vlm, None if images is None else encode(vlm, images), question)


# 280 px: Qwen2.5-VL's windows at the border are smaller than inside.
@pytest.mark.parametrize("side", [112, 280])
def test_a_score_is_the_log_likelihood_of_the_answer(vlm, side):
    vlm = load(vlm.source.checkpoint, side)
    drawn = np.random.default_rng(1).integers(0, 256, (2, side, side), dtype=np.uint8)
    images = torch.from_numpy(drawn)
    scores = likelihoods(vlm, images)
    assert scores.dtype == torch.float64
    answers = [answer for own in CLASSES for answer in own]
    expected = [[plain_likelihood(vlm, image, answer) for answer in answers] for image in images]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)  # norms compute in fp32
    assert (scores[0] - scores[1]).abs().min() > 1e-3  # they do differ by image
    torch.testing.assert_close(likelihoods(vlm, images, share=False), scores, atol=1e-9, rtol=0)


def test_a_window_shorter_than_the_prompt_hides_what_is_far(checkpoints, images, tmp_path):
    folder = shutil.copytree(checkpoints / "medgemma", tmp_path / "medgemma")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    vlm = load(folder)
    expected = [[plain_likelihood(vlm, image, "normal") for image in images[:2]]]
    found = likelihoods(vlm, images[:2], [["normal"]])
    np.testing.assert_allclose(found.T, expected, rtol=0, atol=1e-5)
    wide = likelihoods(load(checkpoints / "medgemma"), images[:2], [["normal"]])
    assert (wide - found).abs().min() > 1e-4


def test_a_question_without_image_is_text_alone(vlm):
    answers = [answer for own in CLASSES for answer in own]
    expected = [[plain_likelihood(vlm, None, answer) for answer in answers]]
    np.testing.assert_allclose(likelihoods(vlm, None), expected, rtol=0, atol=1e-5)


def test_a_score_does_not_depend_on_the_batch(vlm):
    images = np.random.default_rng(2).integers(0, 256, (64, 112, 112), dtype=np.uint8)
    images = torch.from_numpy(images)
    many = likelihoods(vlm, images)
    one = torch.cat([likelihoods(vlm, images[i : i + 1]) for i in (0, 17, 63)])
    torch.testing.assert_close(many[[0, 17, 63]], one, atol=1e-9, rtol=0)


def test_spellings_add_up_to_the_probability_of_a_class(qwen, images):
    answers = likelihoods(qwen, images).exp()
    question = prepare_question(qwen, QUESTION, CLASSES)
    with torch.inference_mode():
        classes = class_likelihoods(qwen, encode(qwen, images), question)
    sums = torch.stack([answers[:, :3].sum(1), answers[:, 3:5].sum(1), answers[:, 5]], 1)
    torch.testing.assert_close(classes.exp(), sums)
    np.testing.assert_allclose(covered(classes.numpy()), answers.sum(1))
    np.testing.assert_allclose(probabilities(classes.numpy()), sums / sums.sum(1, keepdim=True))


def test_logits_of_bf16_weights_are_not_rounded_to_bf16():
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(4, 3, 64, dtype=torch.bfloat16) * 20
    exact = hidden.double() @ head.weight.double().T
    assert (head(hidden).double() - exact).abs().max() > 0.02
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(head, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


def test_bf16_gives_about_the_same(vlm, images):
    exact = likelihoods(vlm, images)
    AcceleratorState._reset_state(reset_partial_state=True)
    rough = load(vlm.source.checkpoint, precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert rough.model.dtype == torch.bfloat16
    found = likelihoods(rough, images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=0.5, rtol=0)


def test_all_answers_are_scored_in_one_pass_behind_a_shared_prefix(qwen, images, monkeypatch):
    question = prepare_question(qwen, QUESTION, CLASSES)
    prefix = prompt_ids(qwen, QUESTION).index(qwen.config.image_token_id)
    assert question.before[0][0].shape[2] == prefix
    tree = {
        ids[:i]
        for own in CLASSES
        for text in own
        for ids in [tuple(qwen.tokenizer(text)["input_ids"])]
        for i in range(1, len(ids) + 1)
    }
    assert question.ids.shape[1] == len(prompt_ids(qwen, QUESTION)) - prefix + len(tree)
    passes, read = [], likelihood.read
    monkeypatch.setattr(likelihood, "read", lambda *a, **k: passes.append(1) or read(*a, **k))
    with torch.inference_mode():
        class_likelihoods(qwen, encode(qwen, images), question)
    assert len(passes) == 1


# --- Free text -------------------------------------------------------------------------------


def test_free_answers_of_a_batch_do_not_influence_each_other(talkative):
    images = torch.stack([torch.full((112, 112), 30 * i, dtype=torch.uint8) for i in range(8)])
    many = generate_answers(talkative, images, QUESTION, 6)
    assert many == [generate_answers(talkative, image[None], QUESTION, 6)[0] for image in images]
    assert len(set(many)) > 2


def test_decoding_is_greedy_whatever_the_checkpoint_says(talkative, images, tmp_path):
    folder = shutil.copytree(talkative.source.checkpoint, tmp_path / "vlm")
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other = load(folder)
    other.model.load_state_dict(talkative.model.state_dict())
    said = [generate_answers(vlm, images, QUESTION, 6) for vlm in (other, talkative)]
    assert said[0] == said[1]


def test_an_answer_names_one_class_or_none():
    answers = PROMPTS.answers.model_dump()
    meant = {
        "covid19": ["COVID-19", "covid 19.", "It is COVID19!", "COVID"],
        "normal": ["**normal**\n", "normal, normal"],
        "tuberculosis": ["Answer:tuberculosis", "TB."],
        None: ["abnormal", "normally", "COVID-19 or tuberculosis", "pneumonia", ""],
    }
    for label, texts in meant.items():
        assert {parse_answer(text, answers) for text in texts} == {label}, label


# --- Checkpoints and prompts -----------------------------------------------------------------


def test_a_checkpoint_of_another_family_is_refused_before_weights_are_read(checkpoints):
    with pytest.raises(CheckpointError, match="model_type is siglip, expected qwen2_5_vl or"):
        load(checkpoints / "siglip")


@pytest.mark.parametrize(
    "template",
    [None, "{% if", "{{ raise_exception('no') }}", "no image", "<|image_pad|>x<|im_end|>"],
)
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
    family = FAMILIES["qwen2_5_vl"]
    qwen = Vlm(source, family, model, tokenizer, template, None, 224, "bicubic")
    text = PROMPTS.ask("ct", PROMPTS.question)
    ids = prompt_ids(qwen, text)
    assert ids.count(config.image_token_id) == 64
    assert "an axial chest CT slice" in tokenizer.decode(ids)
    assert "COVID-19, normal or tuberculosis" in tokenizer.decode(ids)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(qwen)) == "<|im_end|>"
    for answer in (text for own in PROMPTS.spellings() for text in own):  # as in its context
        own = tokenizer(answer, add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"assistant\n{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        assert whole[-len(own) - 1 : -1] == own


@pytest.mark.parametrize(
    "change",
    [
        {"question": "Which one, {classes}?"},
        {"question": "{modality} {modality} {classes}?"},
        {"paraphrases": ["{modality}? {classes}?"] * 2},
        {"answers": {"covid19": ["abnormal"], "normal": ["normal"], "tuberculosis": ["TB"]}},
        {"answers": {"covid19": ["COVID"] * 2, "normal": ["normal"], "tuberculosis": ["TB"]}},
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(change):
    content = {"prompts": {"vlm": PROMPTS.model_dump() | change}}
    with pytest.raises(ParameterError, match=r"and \{classes\} once|part of|at least 3|twice"):
        Params(content, "phantom", 0).section("prompts.vlm", VlmPrompts)
