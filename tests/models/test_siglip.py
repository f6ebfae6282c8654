"""SigLIP by prompts and as a classifier: what is tokenized, scored and saved."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from support import ROOT, require_shared
from transformers import AutoTokenizer, SiglipForImageClassification, SiglipModel

from chest.core.errors import ParameterError
from chest.core.labels import LABELS
from chest.core.params import load_params
from chest.models.common.checkpoints import CheckpointError, Source, find_checkpoint
from chest.models.common.classification import (
    ImageRows,
    classify,
    classify_rows,
    load_trained,
    save_classifier,
)
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import load_normalization, to_pixels
from chest.models.common.preprocessing import write_preprocessing
from chest.models.siglip import (
    SiglipPrompts,
    compare,
    compare_rows,
    load_classifier,
    load_prompt_classifier,
    tokenize,
)
from chest.models.trained import load_trained_predictor

PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.siglip", SiglipPrompts)
ONE_EACH = SiglipPrompts(**{label: [getattr(PROMPTS, label)[0]] for label in LABELS})


@pytest.fixture
def fresh_precision():
    """Accelerate keeps the first precision of a process; forget it before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def theirs(source, images, dtype):
    """Probabilities by transformers alone, of one prompt per class."""
    model = SiglipModel.from_pretrained(source.checkpoint, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.checkpoint)
    texts = [getattr(ONE_EACH, label)[0] for label in LABELS]
    ids = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    pixels = (images[:, None].to(dtype) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        output = model(input_ids=ids, pixel_values=pixels.expand(-1, 3, -1, -1))
    return output.logits_per_image.softmax(1)


# --- Prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_probabilities_are_the_softmax_of_transformers_own_logits(
    siglip_source, images, precision, tolerance
):
    accelerator = start(0, precision)
    classifier = load_prompt_classifier(accelerator, siglip_source, 112, ONE_EACH)
    store = place_images(images.numpy(), accelerator.device)
    found = np.array(compare_rows(accelerator, classifier, store, np.arange(5), 2))
    expected = theirs(siglip_source, images, torch.float64).numpy()
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert np.ptp(expected, axis=0).min() > 1e-3  # they do differ by image


def test_cosines_are_not_taken_in_bf16(fresh_precision, siglip_source, images):
    accelerator = start(0, "bf16")
    classifier = load_prompt_classifier(accelerator, siglip_source, 112, PROMPTS)
    pixels = to_pixels(images, classifier.normalization)
    with torch.inference_mode():
        found = compare(accelerator, classifier, images)
        with accelerator.autocast():
            features = classifier.model.get_image_features(pixels).pooler_output
    assert features.dtype == torch.bfloat16
    cosines = (
        torch.nn.functional.normalize(features.double(), dim=1) @ classifier.classes.double().T
    )
    expected = (cosines * classifier.model.logit_scale.double().exp()).softmax(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_prompts_are_lower_cased_and_padded_at_their_end(siglip_source):
    tokenizer = siglip_source.load_tokenizer()
    tokenizer.padding_side = "left"  # as SigLIP 2's may be
    ids = tokenize(siglip_source, tokenizer, ["LUNGS", "a chest X-ray"])
    assert ids.shape == (2, 64)
    assert torch.equal(ids[:1], tokenize(siglip_source, tokenizer, ["lungs"]))
    assert (ids[:, -1] == tokenizer.pad_token_id).all()


def test_a_prompt_that_would_be_cut_is_refused(siglip_source):
    with pytest.raises(ParameterError, match=r"prompts.siglip: .* at most 64"):
        tokenize(siglip_source, siglip_source.load_tokenizer(), ["lungs", "lungs " * 80])


def test_a_tokenizer_that_does_not_close_texts_is_refused(siglip_source, qwen_source):
    with pytest.raises(CheckpointError, match=r"does not close a text with an end token"):
        tokenize(siglip_source, qwen_source.load_tokenizer(), ["lungs"])


def test_the_real_tokenizer_cuts_no_prompt():
    source = Source(str(require_shared("tokenizers") / "siglip"), "main", None)
    tokenizer = source.load_tokenizer()
    for prompt in [*PROMPTS.covid19, *PROMPTS.normal, *PROMPTS.tuberculosis]:
        ids = tokenize(source, tokenizer, [prompt])[0]
        read = tokenizer.decode(ids, skip_special_tokens=True).lower()
        letters = [c for c in prompt.lower() if c.isalnum()]
        assert [c for c in read if c.isalnum()] == letters
        assert ids[-1] == tokenizer.pad_token_id  # with room to spare


# --- Classifier ------------------------------------------------------------------------------


def test_all_parameters_of_the_classifier_learn(siglip_source, images):
    # One without a gradient would stop training on several GPUs.
    model = load_classifier(siglip_source, 112)
    classify(start(0), model, images, load_normalization(siglip_source)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_saved_classifier_answers_alike_and_predicts(siglip_source, images, tmp_path):
    accelerator = start(1, "fp64")
    model = load_classifier(siglip_source, 112, torch.float64)
    normalization = load_normalization(siglip_source)
    folder = tmp_path / "finetune_siglip"
    save_classifier(model, normalization, 112, folder)
    source = find_checkpoint(str(folder), "main")
    assert load_normalization(source) == normalization
    store = place_images(images.numpy(), accelerator.device)
    data = ImageRows(store, np.array([4, 0, 1]), normalization)
    logits = classify_rows(accelerator, model, data, 2)
    assert logits.dtype == np.float64
    again = load_trained(source, torch.float64)
    np.testing.assert_array_equal(classify_rows(accelerator, again, data, 2), logits)

    write_preprocessing(folder, PARAMS)
    predictor = load_trained_predictor(folder, PARAMS)
    assert (predictor.image_size, predictor.needs_modality) == (112, False)
    probabilities = predictor.classify(images.numpy(), data.rows, ["ct"] * 3)
    odds = np.exp(logits)
    np.testing.assert_allclose(probabilities, odds / odds.sum(1, keepdims=True))
    heat = predictor.explain(images.numpy()[:2], np.array([0, 2]))
    assert heat.shape == (2, 14, 14)
    assert predictor.describe(3)["name"] == "finetune_siglip"


def test_a_classifier_of_other_classes_is_refused(siglip_source, tmp_path):
    config = load_classifier(siglip_source, 112).config
    config.id2label = dict(enumerate(LABELS[::-1]))
    model = SiglipForImageClassification(config)
    save_classifier(model, load_normalization(siglip_source), 112, tmp_path)
    with pytest.raises(CheckpointError, match="no classifier of covid19, normal, tuberc"):
        load_trained(find_checkpoint(str(tmp_path), "main"))
