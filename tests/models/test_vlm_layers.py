"""Features along the way through a vision-language model, and what a probe reads from them."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import ROOT, run_stage

from chest.core.params import load_params
from chest.evaluation.layers import score_layers
from chest.models.common.checkpoints import find_checkpoint
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.vlm.asking import AskedRows, Asker, VlmPrompts, VlmSettings
from chest.models.vlm.layers import extract_layers, layer_names
from chest.models.vlm.model import image_inputs, load_vlm, prompt_ids

PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.vlm", VlmPrompts)
SETTINGS = PARAMS.system("zeroshot_qwen", VlmSettings)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "medgemma"])
def test_features_are_those_of_transformers_own_forward(checkpoints, images, name):
    accelerator = start(0, "fp64")
    vlm = load_vlm(accelerator, find_checkpoint(str(checkpoints / name), "main"), 112)
    store, rows = place_images(images.numpy(), accelerator.device), np.arange(5)
    modalities = ["ct", "xray", "xray", "ct", "ct"]
    asker = Asker(accelerator, vlm, PROMPTS, SETTINGS, batch_size=2)
    found = extract_layers(asker, AskedRows(store, rows, modalities))
    assert [*found] == layer_names(vlm) == ["vision", "merger", "language_1", "language_2"]
    for row, modality in enumerate(modalities):
        ids = torch.tensor([prompt_ids(vlm, PROMPTS.ask(modality, PROMPTS.question))])
        inputs = image_inputs(vlm, images[row][None])
        types = {vlm.family.token_types: (ids == vlm.config.image_token_id).int()}
        with torch.inference_mode():
            seen = vlm.model.model.get_image_features(**inputs)
            states = vlm.model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                output_hidden_states=True,
                **types,
                **inputs,
            ).hidden_states
        expected = {
            "vision": seen.last_hidden_state.reshape(64, -1).mean(0),
            "merger": torch.cat([*seen.pooler_output]).reshape(16, -1).mean(0),
            "language_1": states[1][0, -1],
            "language_2": states[2][0, -1],
        }
        for layer, values in expected.items():
            np.testing.assert_allclose(found[layer][row], values, atol=1e-5, err_msg=layer)


def test_a_probe_finds_the_layer_that_knows_the_class():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"label": np.resize(["covid19", "normal"], 240), "modality": "ct"})
    table["split"] = np.repeat(["train", "val", "test"], 80)
    table["patient_id"] = [f"p{i}" for i in range(240)]
    noise = rng.normal(size=(240, 8))
    knows = noise + 4 * (table["label"] == "normal").to_numpy()[:, None]
    scores = pd.DataFrame(score_layers({"vision": knows, "language_1": noise}, table, 0))
    uar = scores[scores["modality"] == "ct"].set_index("layer")["uar"]
    assert uar["vision"] > 0.95
    assert 0.3 < uar["language_1"] < 0.7


def test_the_stage_scores_every_layer(study):
    run_stage("probe_vlm")
    scores = pd.read_csv("data/layers/zeroshot_qwen.csv")
    assert set(scores["modality"]) == {"all", "ct", "xray"}
    assert np.load("data/layers/zeroshot_qwen/merger.npy").shape == (40, 64)
