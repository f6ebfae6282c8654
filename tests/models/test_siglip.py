"""SigLIP by prompts and as a classifier: what is tokenized, scored and saved."""

from itertools import chain

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from support import ROOT, require_shared
from transformers import AutoTokenizer, SiglipModel

from chest.core.errors import ParameterError
from chest.core.labels import LABELS, MODALITIES
from chest.core.params import load_params
from chest.models.common.checkpoints import CheckpointError, Source
from chest.models.common.device import start
from chest.models.common.image_store import place_images
from chest.models.common.pixels import to_pixels
from chest.models.siglip import (
    SiglipPrompts,
    compare,
    compare_rows,
    load_prompt_classifier,
    tokenize,
)

PARAMS = load_params(ROOT / "params.yaml")
PROMPTS = PARAMS.section("prompts.siglip", SiglipPrompts)
ONE_EACH = PROMPTS.model_copy(update={label: [getattr(PROMPTS, label)[0]] for label in LABELS})
TOLD = ["ct", "xray", "xray", "ct", "xray"]  # modalities of the images


@pytest.fixture
def fresh_precision():
    """Accelerate keeps the first precision of a process; forget it before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def theirs(source, images, dtype, modality):
    """Probabilities by transformers alone, of one prompt per class."""
    model = SiglipModel.from_pretrained(source.checkpoint, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.checkpoint)
    texts = [ONE_EACH.of(label, modality)[0] for label in LABELS]
    ids = tokenizer(texts, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    pixels = (images[:, None].to(dtype) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        output = model(input_ids=ids, pixel_values=pixels.expand(-1, 3, -1, -1))
    return output.logits_per_image.softmax(1)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_probabilities_are_the_softmax_of_transformers_own_logits(
    siglip_source, images, precision, tolerance
):
    accelerator = start(0, precision)
    classifier = load_prompt_classifier(accelerator, siglip_source, 112, ONE_EACH)
    store = place_images(images.numpy(), accelerator.device)
    found = np.array(compare_rows(accelerator, classifier, store, np.arange(5), TOLD, 2))
    by_modality = {
        name: theirs(siglip_source, images, torch.float64, name).numpy() for name in ("ct", "xray")
    }
    expected = np.array([by_modality[name][i] for i, name in enumerate(TOLD)])
    assert np.abs(by_modality["ct"] - by_modality["xray"]).max() > 1e-4
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert np.ptp(expected, axis=0).min() > 1e-3  # they do differ by image


def test_cosines_are_not_taken_in_bf16(fresh_precision, siglip_source, images):
    accelerator = start(0, "bf16")
    classifier = load_prompt_classifier(accelerator, siglip_source, 112, PROMPTS)
    pixels = to_pixels(images, classifier.normalization)
    with torch.inference_mode():
        found = compare(accelerator, classifier, images, TOLD)
        with accelerator.autocast():
            features = classifier.model.get_image_features(pixels).pooler_output
    assert features.dtype == torch.bfloat16
    own = classifier.classes[[MODALITIES.index(name) for name in TOLD]].double()
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = torch.einsum("bcd,bd->bc", own, unit)
    expected = (cosines * classifier.model.logit_scale.double().exp()).softmax(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_prompts_are_lower_cased_and_padded_at_their_end(siglip_source):
    tokenizer = siglip_source.load_tokenizer()
    tokenizer.padding_side = "left"  # as SigLIP 2's may be
    ids = tokenize(siglip_source, tokenizer, ["LUNGS", "a chest X-ray"])
    assert ids.shape == (2, 64)
    assert torch.equal(ids[:1], tokenize(siglip_source, tokenizer, ["lungs"]))
    assert (ids[:, -1] == tokenizer.pad_token_id).all()


def test_every_prompt_names_the_modality_and_nothing_else_differs():
    for label in LABELS:
        for ct, xray in zip(PROMPTS.of(label, "ct"), PROMPTS.of(label, "xray"), strict=True):
            assert PROMPTS.modality.ct in ct
            assert ct.replace(PROMPTS.modality.ct, PROMPTS.modality.xray) == xray
    with pytest.raises(ValueError, match=r"needs \{modality\} once"):
        SiglipPrompts(**PROMPTS.model_dump() | {"normal": ["a chest X-ray with clear lungs"]})


def test_a_prompt_that_would_be_cut_is_refused(siglip_source):
    with pytest.raises(ParameterError, match=r"prompts.siglip: .* at most 64"):
        tokenize(siglip_source, siglip_source.load_tokenizer(), ["lungs", "lungs " * 80])


def test_a_tokenizer_that_does_not_close_texts_is_refused(siglip_source, qwen_source):
    with pytest.raises(CheckpointError, match=r"does not close a text with an end token"):
        tokenize(siglip_source, qwen_source.load_tokenizer(), ["lungs"])


def test_the_real_tokenizer_cuts_no_prompt():
    source = Source(str(require_shared("tokenizers") / "siglip"), "main", None)
    tokenizer = source.load_tokenizer()
    prompts = [PROMPTS.of(label, modality) for label in LABELS for modality in MODALITIES]
    for prompt in chain(*prompts):
        ids = tokenize(source, tokenizer, [prompt])[0]
        read = tokenizer.decode(ids, skip_special_tokens=True).lower()
        letters = [c for c in prompt.lower() if c.isalnum()]
        assert [c for c in read if c.isalnum()] == letters
        assert ids[-1] == tokenizer.pad_token_id  # with room to spare
