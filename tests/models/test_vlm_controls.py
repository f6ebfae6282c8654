"""How many images are asked about: modalities, priors, controls, and what is kept of them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from support import ROOT, run_stage

from chest.core.labels import LABELS
from chest.core.params import load_params
from chest.data.dataset import Dataset, read_labelled
from chest.evaluation.control_scores import score_controls, survives_without_image
from chest.evaluation.controls import read_controls
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.vlm import asking
from chest.models.vlm.asking import (
    AskedRows,
    Asker,
    VlmPrompts,
    VlmSettings,
    asked,
    controls,
    covered,
)
from chest.models.vlm.controls import (
    ask_with_controls,
    describe_prior,
    find_prior,
    parse_prior,
)
from chest.models.vlm.likelihood import class_likelihoods, encode, prepare_question
from chest.models.vlm.model import load_vlm

PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.vlm", VlmPrompts)
SETTINGS = PARAMS.system("zeroshot_qwen", VlmSettings)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen(checkpoints):
    accelerator = start(0, "fp64")
    return load_vlm(accelerator, find_checkpoint(str(checkpoints / "qwen"), "main"), 112)


def make_asker(vlm, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return Asker(start(0, "fp64"), vlm, PROMPTS, settings, batch_size=2)


def dataset(images, splits=("train", "train", "test", "test", "val")):
    table = pd.DataFrame({"image_id": [f"i{k}" for k in range(5)], "split": splits})
    table = table.assign(label="normal", modality=["ct", "xray", "xray", "xray", "ct"])
    return Dataset(table.assign(patient_id=table["image_id"]), images.numpy())


# --- Questions -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["likelihood", "generate"])
def test_rows_are_asked_in_the_words_of_their_modality(qwen, images, monkeypatch, method):
    def generate(vlm, images, question, _):
        return ["COVID-19" if "CT slice" in question else "no idea" for _ in images]

    monkeypatch.setattr(asking, "generate_answers", generate)
    rows, modalities = np.array([4, 0, 3]), ["ct", "xray", "ct"]
    about = AskedRows(place_images(images.numpy(), CPU), rows, modalities)
    found = make_asker(qwen, method=method).ask(about, [asked(PROMPTS)])[:, 0]
    if method == "generate":
        assert asking.probabilities(found) == [[1.0, 0.0, 0.0], None, [1.0, 0.0, 0.0]]
        assert covered(found).tolist() == [1, 0, 1]
        return
    for row, modality, own in zip(rows, modalities, found, strict=True):
        text = PROMPTS.ask(modality, PROMPTS.question)
        question = prepare_question(qwen, text, PROMPTS.spellings())
        with torch.inference_mode():
            alone = class_likelihoods(qwen, encode(qwen, images[row][None]), question)[0]
        np.testing.assert_allclose(own, alone, atol=1e-6)


def test_controls_ask_in_every_order_in_other_words_and_without_the_image(qwen, images):
    conditions = {c.name: c for c in controls(PROMPTS)}
    orders = [c.order for name, c in conditions.items() if name.startswith("order_")]
    assert len({*orders, LABELS}) == 6
    assert sum(name.startswith("paraphrase_") for name in conditions) == 3
    question = PROMPTS.ask("ct", PROMPTS.question, ("tuberculosis", "normal", "covid19"))
    assert "tuberculosis, normal or COVID-19" in question

    rows = np.array([1, 2, 3])
    about = AskedRows(place_images(images.numpy(), CPU), rows, ["xray"] * 3, np.array([2, 3, 1]))
    asker = make_asker(qwen)
    answers = asker.ask(about, [*conditions.values()])
    found = dict(zip(conditions, answers.swapaxes(0, 1), strict=True))
    np.testing.assert_allclose(found["other_image"], found["asked"][[1, 2, 0]], atol=1e-9)
    assert np.ptp(found["no_image"], axis=0).max() == 0
    # Columns are classes, whatever the order in the question.
    order = ("normal", "covid19", "tuberculosis")
    text = PROMPTS.ask("xray", PROMPTS.question, order)
    question = prepare_question(qwen, text, PROMPTS.spellings())
    with torch.inference_mode():
        alone = class_likelihoods(qwen, encode(qwen, images[rows]), question)
    np.testing.assert_allclose(found["order_normal_covid19_tuberculosis"], alone, atol=1e-9)
    assert np.abs(found["asked"] - found["order_normal_covid19_tuberculosis"]).min() > 1e-6


# --- Priors ----------------------------------------------------------------------------------


def test_the_content_free_prior_is_the_mean_over_blank_images(qwen):
    found = find_prior("content_free", make_asker(qwen), [asked(PROMPTS)])
    assert not np.allclose(found["ct"], found["xray"], atol=1e-9)
    blank = torch.stack([torch.full((112, 112), v, dtype=torch.uint8) for v in (0, 128, 255)])
    text = PROMPTS.ask("ct", PROMPTS.question)
    question = prepare_question(qwen, text, PROMPTS.spellings())
    with torch.inference_mode():
        expected = class_likelihoods(qwen, encode(qwen, blank), question).mean(0)
    np.testing.assert_allclose(found["ct"][0], expected, atol=1e-9)
    parsed = parse_prior(describe_prior("content_free", found))
    np.testing.assert_allclose(parsed["ct"], found["ct"], atol=1e-6)


def test_the_unlabelled_prior_knows_training_images_only_and_no_label(qwen, images):
    def prior(data, shown=images):
        store = place_images(shown.numpy(), CPU)
        return find_prior("unlabelled", make_asker(qwen), [asked(PROMPTS)], store, data)

    expected = prior(dataset(images))
    relabelled = dataset(images)
    relabelled.table["label"] = "tuberculosis"
    changed = images.clone()
    changed[2:] = 0  # test and validation
    for found in (prior(relabelled), prior(relabelled, changed)):
        np.testing.assert_array_equal(found["xray"], expected["xray"])
    changed[1] = 0
    assert not np.allclose(prior(relabelled, changed)["xray"], expected["xray"])


@pytest.mark.parametrize("prior", ["none", "content_free", "unlabelled"])
def test_the_declared_prior_decides_and_all_figures_are_kept(qwen, images, prior):
    store, data = place_images(images.numpy(), CPU), dataset(images)
    rows = data.rows("test", "val")
    replies = ask_with_controls(make_asker(qwen, prior=prior), store, data, rows)
    raw, decisive = replies.raw, replies.decisive
    np.testing.assert_array_equal(decisive["asked"], decisive[f"prior_{prior}"])
    np.testing.assert_array_equal(decisive["prior_none"], raw["asked"])
    # The two X-rays of the test split are of two patients: each is shown instead of the other.
    np.testing.assert_allclose(raw["other_image"][:2], raw["asked"][[1, 0]], atol=1e-9)
    assert {"prior_none", "prior_content_free", "prior_unlabelled"} < {*decisive}
    assert np.abs(decisive["prior_content_free"] - decisive["prior_unlabelled"]).max() > 1e-6
    # Without an image nothing may be left but the question's own prior, in every condition.
    correction = {m: own[1] for m, own in replies.prior.items()}
    expected = raw["no_image"] - [correction[m] for m in data.table["modality"].iloc[rows]]
    np.testing.assert_allclose(decisive["no_image"], expected, atol=1e-12)


def test_free_text_has_no_prior():
    assert SETTINGS.model_copy(update={"method": "generate"}).correction == "none"
    assert SETTINGS.correction == SETTINGS.prior


# --- The stage -------------------------------------------------------------------------------


def test_a_stage_keeps_every_answer_and_the_share_that_the_answers_cover(study):
    run_stage("zeroshot_qwen")
    table = read_controls("zeroshot_qwen", read_labelled("val", "test"))
    assert len(table) == 35 * (11 + 3)
    answers = pd.read_csv("data/predictions/zeroshot_qwen.csv")
    own = table[table["condition"] == "asked"].reset_index(drop=True)
    pd.testing.assert_frame_equal(own[list(answers)], answers)
    scores = score_controls(table, 0).set_index(["split", "modality", "condition"])
    assert scores.loc[("test", "all", "asked"), "changed"] == 0
    assert scores.loc[("test", "all", "asked"), "gain"] == 0
    assert (
        scores.loc[("test", "ct", "no_image"), "n"] + scores.loc[("test", "xray", "no_image"), "n"]
        == 30
    )
    record = json.loads((study / "data/predictions/zeroshot_qwen.json").read_text())
    assert record["details"]["covered"] == round(own["covered"].mean(), 6)


def test_a_result_that_needs_no_image_is_told():
    rng = np.random.default_rng(0)
    base = pd.DataFrame({"image_id": [f"i{k:03}" for k in range(200)], "split": "test"})
    base["actual"] = np.resize(["normal", "covid19"], 200)
    base = base.assign(modality="ct", patient_id=base["image_id"], covered=0.9)
    guess = np.where(rng.random(200) < 0.5, "normal", "covid19")
    sees = [base.assign(condition="asked", predicted=base["actual"])]
    blind = [base.assign(condition="asked", predicted=guess)]
    other = base.assign(condition="other_image", predicted=np.roll(guess, 1))
    for tables, expected in ((sees, []), (blind, ["ct"])):
        scores = score_controls(pd.concat([*tables, other]), 0)
        assert survives_without_image(scores) == expected
    row = scores[(scores["condition"] == "other_image") & (scores["modality"] == "ct")].iloc[0]
    assert row["changed"] == (guess != np.roll(guess, 1)).mean()
