"""How well probabilities rank the images, whatever the threshold: AUROC and operating points."""

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score, roc_curve

from chest.labels import LABELS, MODALITIES

# The WHO's target for a triage test of tuberculosis: sensitivity 90 %, specificity 70 % (WHO 2014,
# high-priority target product profiles for new tuberculosis diagnostics).
SENSITIVITY, SPECIFICITY = 0.90, 0.70


def ranking_metrics(table: pd.DataFrame) -> dict:
    """Ranking of one system; `table` has actual, modality, and a probability for each of LABELS.

    Returns a nested dict of floats between 0 and 1:

    ``auroc``  {class: its probability, that class against the others}
    ``auroc_within``  {modality: the disease against normal, within the modality}; the score is the
        disease's share of the two probabilities, which takes the third class out
    ``triage``  tuberculosis against normal within X-rays: ``sensitivity_at_specificity_70`` and
        ``specificity_at_sensitivity_90``, the best that a threshold gives on these images

    What needs two classes and finds one is left out; ties count half, as in the AUROC.
    """
    result: dict = {"auroc": {}, "auroc_within": {}}
    for label in LABELS:
        truth = table["actual"] == label
        if truth.any() and not truth.all():
            result["auroc"][label] = float(roc_auc_score(truth, table[label]))
    for modality in MODALITIES:
        truth, score = disease_scores(table, modality)
        if truth.any() and not truth.all():
            result["auroc_within"][modality] = float(roc_auc_score(truth, score))
            if modality == "xray":
                result["triage"] = operating_points(truth, score)
    return {name: value for name, value in result.items() if value}


def disease_scores(table: pd.DataFrame, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Which images of `modality` show its disease, bool (n,), and their scores, float64 (n,).

    The disease is COVID-19 on CT, tuberculosis on X-ray; images of other classes are left out. The
    score is p(disease) / (p(disease) + p(normal)), and one half where both are 0.
    """
    disease = {"ct": "covid19", "xray": "tuberculosis"}[modality]
    chosen = table[(table["modality"] == modality) & table["actual"].isin([disease, "normal"])]
    share, total = chosen[disease].to_numpy(), chosen[[disease, "normal"]].sum(axis=1).to_numpy()
    score = np.divide(share, total, out=np.full(len(chosen), 0.5), where=total > 0)
    return (chosen["actual"] == disease).to_numpy(), score


def operating_points(truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """The best sensitivity at a specificity of at least 70 %, and the reverse at 90 %.

    Thresholds are the scores that occur, and one above them all: both figures always exist.
    """
    false_positive, sensitivity, _ = roc_curve(truth, score, drop_intermediate=False)
    specificity = 1 - false_positive
    # Shares of small counts: 7/10 must count as 70 %.
    enough = 1e-9
    return {
        "sensitivity_at_specificity_70": float(
            sensitivity[specificity >= SPECIFICITY - enough].max()
        ),
        "specificity_at_sensitivity_90": float(
            specificity[sensitivity >= SENSITIVITY - enough].max()
        ),
    }
