"""SigLIP's loss on images and texts: which pairs fit, what trains, and what is kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from case import draw, write_case
from support import ROOT, run_stage, write_params

from chest.core.params import load_params
from chest.data.annotations import write_annotations
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import Normalization
from chest.models.settings import AnnotationPrompts
from chest.models.siglip import SiglipPrompts
from chest.models.trained import load_prompted_predictor
from chest.training.image_text import ImageText, ImageTextSettings, Matcher, load_siglip, make_texts
from chest.training.loop import Batch

PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.siglip", SiglipPrompts)
BLOCK = PARAMS.content["phantom"]["finetune_siglip_text"]
SYSTEM = "finetune_siglip_text"


def settings(checkpoint):
    changes = {"batch_size": 6, "warmup_steps": 2, "epochs": 2, "augment": None}
    return ImageTextSettings(**BLOCK | {"checkpoint": str(checkpoint), "image_size": 32} | changes)


def test_a_text_fits_every_image_of_its_class_and_modality(checkpoint):
    accelerator, data = start(0, "fp64"), draw(32)
    source = find_checkpoint(str(checkpoint), "main")
    siglip = load_siglip(source, 32, torch.float64)
    store = place_images(data.images, accelerator.device)
    tokenizer, normalization = source.load_tokenizer(), Normalization((0.5,) * 3, (0.5,) * 3)
    texts = make_texts(tokenizer, PROMPTS, data, None, accelerator.device)
    shared = (settings(checkpoint), data, accelerator, store, normalization)
    objective = ImageText(*shared, siglip, tokenizer, PROMPTS, [], texts)
    rows = np.array([0, 1, 2, 3, 4])  # four groups; the last is of the first one's
    images = torch.from_numpy(data.images[rows])
    loss = objective.loss(Matcher(siglip), Batch(images, torch.from_numpy(rows), None, 0.0))

    pixels = (images[:, None].double() / 255 - 0.5) / 0.5
    own = torch.tensor([(i + row) % 3 for i, row in enumerate(rows)])
    tokens = texts.tokens[texts.of_image[rows, own]]
    logits = siglip(input_ids=tokens, pixel_values=pixels.expand(-1, 3, -1, -1)).logits_per_image
    signs = 2 * torch.eye(5, dtype=torch.float64) - 1
    signs[0, 4] = signs[4, 0] = 1
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum() / 5
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [name for name, x in siglip.named_parameters() if x.grad is None] == []


def test_notes_stand_behind_the_prompts_of_training_images_only(checkpoint):
    data, tokenizer = draw(32), find_checkpoint(str(checkpoint), "main").load_tokenizer()
    notes = [f"note {i}" for i in range(len(data.table))]
    texts = make_texts(tokenizer, PROMPTS, data, notes, torch.device("cpu"))
    assert len(texts.tokens) == 3 * len(data.rows("train"))
    for row in (0, 35):
        image = data.table.iloc[row]
        prompts = PROMPTS.of(image["label"], image["modality"])
        for i, prompt in enumerate(prompts):
            expected = tokenizer(f"{prompt}. note {row}".lower())["input_ids"]
            found = texts.tokens[texts.of_image[row, i]].tolist()
            assert found[: len(expected)] == expected
    without = make_texts(tokenizer, PROMPTS, data, None, torch.device("cpu"))
    assert len(without.tokens) == 12


@pytest.mark.parametrize("texts", ["plain", "annotated"])
def test_a_trained_model_is_a_checkpoint_that_prompts_classify_with(
    checkpoint, tmp_path, monkeypatch, texts
):
    write_case(tmp_path, checkpoint)
    write_params(tmp_path, **{f"phantom.{SYSTEM}": settings(checkpoint).model_dump()})
    monkeypatch.chdir(tmp_path)
    data = draw(32)
    findings = load_params().section("prompts.annotations", AnnotationPrompts).findings
    values = {name: np.zeros(len(data.table)) for name in findings}
    ids = data.table["image_id"]
    write_annotations(ids, values, [f"note {i}" for i in ids], {"checkpoint": "somewhere"})
    run_stage(SYSTEM, texts)

    written = np.loadtxt(
        f"data/predictions/{SYSTEM}_{texts}.csv", delimiter=",", skiprows=1, usecols=(4, 5, 6)
    )
    predictor = load_prompted_predictor(Path(f"models/{SYSTEM}_{texts}"), load_params())
    rows = data.rows("val", "test", "external")
    found = predictor.classify(data.images, rows, data.table["modality"].to_numpy()[rows])
    np.testing.assert_allclose(found, written, atol=1e-5)


def test_other_texts_are_refused(capsys):
    with pytest.raises(SystemExit, match=r"both: one of plain, annotated"):
        run_stage(SYSTEM, "both")
