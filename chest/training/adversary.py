"""Domain-adversarial training (Ganin et al. 2016, arXiv:1505.07818).

A discriminator learns to tell the domain of an image from its pooled features, and the reversed
gradient teaches the encoder to hide it. Domains are the sites, told apart within each modality, or
the modalities, which fights the label: no CT slice shows tuberculosis.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import PreTrainedModel

from chest.core.labels import MODALITIES
from chest.models.common.classification import head_of, logits_and_features

HIDDEN = 128  # units of the discriminator


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus `strength`, a tensor without axes."""

    @staticmethod
    def forward(context, features: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(strength)
        return features.view_as(features)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (strength,) = context.saved_tensors
        return -strength * gradient, None


@dataclass(frozen=True)
class Domains:
    """The domains among the training images.

    ``codes``: the domain of each image, int64 (N,), -1 if no training image has it. ``possible``:
    which domains occur in each of MODALITIES, bool (2, domains).
    """

    names: list[str]
    codes: np.ndarray
    possible: np.ndarray

    def of(self, rows: np.ndarray) -> "Domains":
        """Return the domains of some rows, int64 (n,)."""
        return replace(self, codes=self.codes[rows])


def find_domains(table: pd.DataFrame, by: str) -> Domains:
    """Return the domains of a dataset's `table`, `by` site (within its modality) or modality."""
    names = table["modality"] if by == "modality" else table["modality"] + " " + table["site"]
    train = table["split"] == "train"
    known = sorted(set(names[train]))
    codes = names.map({name: i for i, name in enumerate(known)}).fillna(-1).to_numpy(np.int64)
    if by == "modality":
        possible = np.ones((len(MODALITIES), len(known)), bool)
    else:
        possible = np.array([[name.startswith(f"{m} ") for name in known] for m in MODALITIES])
    return Domains(known, codes, possible)


class AdversarialNetwork(nn.Module):
    """A classifier with a discriminator of the domains of its pooled features.

    The discriminator learns at `lr_scale` times the rate of the classifier.
    """

    def __init__(self, classifier: PreTrainedModel, domains: int, lr_scale: float):
        super().__init__()
        self.classifier = classifier
        weight = head_of(classifier).weight
        where = {"device": weight.device, "dtype": weight.dtype}
        self.discriminator = nn.Sequential(
            nn.Linear(weight.shape[1], HIDDEN, **where),
            nn.ReLU(),
            nn.Linear(HIDDEN, domains, **where),
        )
        for parameter in self.discriminator.parameters():
            parameter.lr_scale = lr_scale

    def forward(
        self, pixel_values: torch.Tensor, strength: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of the classifier and the logits of the domains, (B, domains)."""
        outputs, features = logits_and_features(self.classifier, pixel_values)
        return outputs, self.discriminator(ReverseGradient.apply(features, strength))


def reversal(progress: float, weight: float, ramp: float) -> float:
    """Return the strength of the reversed gradient when a share `progress` of training is done.

    It rises from 0 to `weight` as in the paper, whose `ramp` is 10.
    """
    return weight * (2 / (1 + math.exp(-ramp * progress)) - 1)


def probe_sites(features: np.ndarray, table: pd.DataFrame) -> dict[str, float]:
    """Return how well a new linear classifier finds the site in the features of each modality.

    It is fitted on the validation images and scored on the test images by balanced accuracy, under
    ``site_found_<modality>``; 1 / sites would be chance. A modality of one site is left out.
    `features` is float64 (n, d), one row per row of `table`.
    """
    found = {}
    for modality in MODALITIES:
        of_modality = (table["modality"] == modality).to_numpy()
        fitted, scored = (of_modality & (table["split"] == s).to_numpy() for s in ("val", "test"))
        sites = table["site"].to_numpy()
        known = scored & np.isin(sites, sites[fitted])
        if len(set(sites[fitted])) < 2 or not known.any():
            continue
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=0.01, class_weight="balanced", max_iter=10_000, tol=1e-8),
        )
        model.fit(features[fitted], sites[fitted])
        score = balanced_accuracy_score(sites[known], model.predict(features[known]))
        found[f"site_found_{modality}"] = round(float(score), 4)
    return found


@torch.no_grad()
def score_discriminator(
    network: AdversarialNetwork, features: np.ndarray, domains: Domains, table: pd.DataFrame
) -> dict[str, float]:
    """Return the discriminator's balanced accuracy on test images, ``discriminator_<modality>``.

    `features` is float64 (n, d), one row per row of `table`, with ``codes`` for the domains of
    these rows. A modality of one domain is left out.
    """
    weight = network.discriminator[0].weight
    logits = network.discriminator(torch.from_numpy(features).to(weight)).cpu().numpy()
    found = {}
    for m, modality in enumerate(MODALITIES):
        rows = (table["modality"] == modality) & (table["split"] == "test") & (domains.codes >= 0)
        if domains.possible[m].sum() < 2 or not rows.any():
            continue
        told = np.where(domains.possible[m], logits[rows], -np.inf).argmax(axis=1)
        score = balanced_accuracy_score(domains.codes[rows], told)
        found[f"discriminator_{modality}"] = round(float(score), 4)
    return found
