"""Features along the way through a vision-language model: where does it lose what it saw?"""

import numpy as np
import torch

from chest.core.labels import MODALITIES
from chest.models.common.batch_inference import in_batches, infer
from chest.models.vlm.asking import AskedRows, Asker
from chest.models.vlm.likelihood import Question, encode, prepare_question, read
from chest.models.vlm.model import Vlm

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the language model's layers


def layer_names(vlm: Vlm) -> list[str]:
    """Return the names of the features of `extract_layers`, in the order of the computation."""
    return ["vision", "merger", *(f"language_{number}" for number in _language_layers(vlm))]


def extract_layers(asker: Asker, data: AskedRows) -> dict[str, np.ndarray]:
    """Return the features of the rows of `data` by layer, float32 (n, d).

    ``vision`` and ``merger``: means over the image's patches and tokens. ``language_<k>``: the last
    token of the question after k layers, with which the answer begins.
    """
    vlm, prompts = asker.vlm, asker.prompts
    questions = {m: prepare_question(vlm, prompts.ask(m, prompts.question), []) for m in MODALITIES}
    modality_of = dict(zip(data.rows.tolist(), data.modalities, strict=True))
    widths: list[int] = []

    def function(rows: np.ndarray) -> torch.Tensor:
        parts = _features(vlm, data.images.take(rows), questions[modality_of[rows[0]]])
        widths[:] = [part.shape[1] for part in parts]
        return torch.cat([part.float() for part in parts], 1)

    modalities = np.asarray(data.modalities)
    groups = [data.rows[modalities == modality] for modality in MODALITIES]
    batches = [batch for rows in groups for batch in in_batches(rows, asker.batch_size)]
    found = infer(asker.accelerator, batches, function)
    table = np.array([found[row] for row in data.rows.tolist()], np.float32)
    parts = np.split(table, np.cumsum(widths)[:-1], axis=1)
    return dict(zip(layer_names(vlm), parts, strict=True))


def _features(vlm: Vlm, images: torch.Tensor, question: Question) -> list[torch.Tensor]:
    """Return the features of uint8 grey `images`, (B, side, side), each (B, d)."""
    seen = encode(vlm, images)
    patches = seen.last_hidden_state.reshape(len(images), -1, seen.last_hidden_state.shape[-1])
    tokens = torch.stack([own.mean(0) for own in seen.pooler_output])
    states = read(vlm, seen, question, output_hidden_states=True).hidden_states
    language = [states[number][:, -1] for number in _language_layers(vlm)]
    return [patches.mean(1), tokens, *language]


def _language_layers(vlm: Vlm) -> list[int]:
    """Return the numbers of the layers, from 1, after which features are taken."""
    count = vlm.config.text_config.num_hidden_layers
    return sorted({max(1, round(share * count)) for share in SHARES})
