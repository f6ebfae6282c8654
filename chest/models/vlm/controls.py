"""What every answer of a vision-language model carries: priors and controls.

A language model favours some words whatever it is shown. A `prior` is each class's mean
log-likelihood over images that show nothing (``content_free``, after Zhao et al. 2021,
arXiv:2102.09690) or over training images whose labels are not read (``unlabelled``, after Zhou et
al. 2024, arXiv:2309.17249); it is subtracted before the classes are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from chest.core.labels import LABELS, MODALITIES
from chest.data.dataset import Dataset
from chest.models.common.image_store import ImageStore, place_images
from chest.models.common.journal import Journal
from chest.models.common.view_masks import another_patient
from chest.models.vlm.asking import (
    PRIORS,
    AskedRows,
    Asker,
    Condition,
    controls,
    covered,
    probabilities,
)

BLANK = (0, 128, 255)  # grey values of images that show nothing
UNLABELLED = 64  # training images of each modality: enough for a mean

Prior = dict[str, np.ndarray]  # by modality: (conditions, 3)


@dataclass(frozen=True)
class Replies:
    """Log-likelihoods of each class by condition, float64 (n, 3): ``raw`` and less the prior.

    ``prior_none``, ``prior_content_free`` and ``prior_unlabelled`` are conditions too: the question
    itself with each prior. ``prior``: the declared one, of the question itself.
    """

    raw: dict[str, np.ndarray]
    decisive: dict[str, np.ndarray]
    prior: Prior

    def tabulate(self) -> dict[str, tuple[list[list[float] | None], np.ndarray]]:
        """Return the class probabilities and the `covered` probability, by condition."""
        return {
            name: (probabilities(own), covered(self.raw[name]))
            for name, own in self.decisive.items()
        }


def ask_with_controls(
    asker: Asker,
    images: ImageStore,
    data: Dataset,
    rows: np.ndarray,
    journal: Journal | None = None,
) -> Replies:
    """Ask about `rows`, int64 (n,), in every condition."""
    conditions, declared = controls(asker.prompts), asker.settings.correction
    modalities = data.table["modality"].to_numpy()
    others = rows[another_patient(data.table.iloc[rows], seed=0)]
    about = AskedRows(images, rows, modalities[rows], others)
    found = asker.ask(about, conditions, journal)
    kinds = PRIORS if asker.settings.method == "likelihood" else ("none",)
    priors = {
        kind: find_prior(kind, asker, conditions[: None if kind == declared else 1], images, data)
        for kind in kinds
    }
    raw = {c.name: found[:, i] for i, c in enumerate(conditions)}
    decisive = {
        c.name: subtract(found[:, i], priors[declared], modalities[rows], i)
        for i, c in enumerate(conditions)
    }
    for kind, prior in priors.items():
        raw[f"prior_{kind}"] = found[:, 0]
        decisive[f"prior_{kind}"] = subtract(found[:, 0], prior, modalities[rows])
    return Replies(raw, decisive, priors[declared])


def subtract(
    likelihoods: np.ndarray, prior: Prior, modalities: Sequence[str], condition: int = 0
) -> np.ndarray:
    """Return `likelihoods`, (n, 3), less the prior of each row's modality."""
    return likelihoods - np.array([prior[modality][condition] for modality in modalities])


def describe_prior(kind: str, prior: Prior) -> dict[str, str]:
    """Return the details of a predictions record that hold the prior of the question itself."""
    values = {f"prior_{m}": " ".join(f"{x:.6f}" for x in own[0]) for m, own in prior.items()}
    return {"prior": kind} | values


def parse_prior(details: Mapping[str, object]) -> Prior:
    """Return the prior that `describe_prior` described."""
    return {m: np.array([str(details[f"prior_{m}"]).split()], np.float64) for m in MODALITIES}


def find_prior(
    kind: str,
    asker: Asker,
    conditions: Sequence[Condition],
    images: ImageStore | None = None,
    data: Dataset | None = None,
) -> Prior:
    """Return the prior `kind` of the question of each condition.

    ``unlabelled`` needs the packed `images` of the study and what is known of them, `data`.
    """
    if kind == "none":
        return dict.fromkeys(MODALITIES, np.zeros((len(conditions), len(LABELS))))
    if kind == "content_free":
        side = asker.vlm.side
        blank = np.stack([np.full((side, side), grey, np.uint8) for grey in BLANK])
        store, rows = place_images(blank, asker.accelerator.device), np.arange(len(BLANK))
        return {m: _mean(asker, store, rows, m, conditions) for m in MODALITIES}
    return {m: _mean(asker, images, sample_training(data, m), m, conditions) for m in MODALITIES}


def sample_training(data: Dataset, modality: str) -> np.ndarray:
    """Return UNLABELLED rows of training images, or all if there are fewer, at equal distances."""
    rows = data.rows("train")
    rows = rows[data.table["modality"].to_numpy()[rows] == modality]
    return rows[np.unique(np.linspace(0, len(rows) - 1, UNLABELLED).astype(int))]


def _mean(
    asker: Asker,
    images: ImageStore,
    rows: np.ndarray,
    modality: str,
    conditions: Sequence[Condition],
) -> np.ndarray:
    """Return the mean log-likelihoods over `rows`, (conditions, 3); zeros if there are none.

    A prior belongs to a question: it is asked with an image also where the condition has none.
    """
    if not len(rows):
        return np.zeros((len(conditions), len(LABELS)))
    shown = [replace(condition, image="own") for condition in conditions]
    return asker.ask(AskedRows(images, rows, [modality] * len(rows)), shown).mean(axis=0)
