"""Findings and descriptions that a vision-language model writes of an image, from it alone."""

import numpy as np
from accelerate import Accelerator

from chest.core.labels import MODALITIES
from chest.core.params import Positive, Section, Text
from chest.models.common.batch_inference import in_batches, infer
from chest.models.common.journal import Journal
from chest.models.settings import AnnotationPrompts
from chest.models.vlm.asking import AskedRows
from chest.models.vlm.generation import generate_answers
from chest.models.vlm.likelihood import class_likelihoods, encode, prepare_question
from chest.models.vlm.model import Vlm


class AnnotationSettings(Section):
    """The block ``annotate`` of a profile in params.yaml."""

    checkpoint: Text
    revision: Text
    image_size: Positive
    max_new_tokens: Positive
    batch_size: Positive


def annotate(
    accelerator: Accelerator,
    vlm: Vlm,
    data: AskedRows,
    prompts: AnnotationPrompts,
    settings: AnnotationSettings,
    journal: Journal | None = None,
) -> list[tuple[list[float], str]]:
    """Return for each row the log-likelihood of each finding, and a description.

    The model is shown the image and told its modality, nothing else. Decoding is greedy.
    """
    findings = [*prompts.findings.values()]
    questions = {
        m: prepare_question(vlm, prompts.ask(prompts.finding, m), findings) for m in MODALITIES
    }
    modality_of = dict(zip(data.rows.tolist(), data.modalities, strict=True))

    def function(rows: np.ndarray) -> list:
        images, modality = data.images.take(rows), modality_of[rows[0]]
        likelihoods = class_likelihoods(vlm, encode(vlm, images), questions[modality]).tolist()
        text = prompts.ask(prompts.description, modality)
        said = generate_answers(vlm, images, text, settings.max_new_tokens)
        return [*zip(likelihoods, map(one_line, said), strict=True)]

    modalities = np.asarray(data.modalities)
    groups = [data.rows[modalities == modality] for modality in MODALITIES]
    batches = [batch for rows in groups for batch in in_batches(rows, settings.batch_size)]
    found = infer(accelerator, batches, function, journal)
    return [(found[row][0], found[row][1]) for row in data.rows.tolist()]


def one_line(text: str) -> str:
    """Return `text` with every run of white space as one space, and without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
