"""Ranking by probability (AUROC) and operating points whose thresholds come from validation."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import beta, norm
from sklearn.metrics import roc_auc_score, roc_curve

from chest.core.labels import DISEASES, LABELS
from chest.evaluation.intervals import (
    DRAWS,
    LEVEL,
    Bootstrap,
    Interval,
    percentile_interval,
    recall_draws,
)

# The WHO's target for a triage test of tuberculosis: sensitivity 90 %, specificity 70 % (WHO 2014,
# high-priority target product profiles for new tuberculosis diagnostics).
SENSITIVITY, SPECIFICITY = 0.90, 0.70
UNREACHED = 1.01  # threshold that no score reaches
FEWEST_ERRORS = 0.25  # in patients; see `auroc`
DRAWS_AT_ONCE = 128
ROUNDING = 1e-9  # 7/10 must count as 70 %


def roc_metrics(table: pd.DataFrame, seed: int, draws: int = DRAWS) -> dict:
    """Return the AUROCs of one system's answers (see `predictions.System`) with 95 % intervals.

    The result is a nested dict of floats from 0 to 1:

    ``auroc``, ``auroc_low``, ``auroc_high``  {class: that class against the others}
    ``auroc_within``, ``…_low``, ``…_high``   {modality: its disease against normal}; see
        `disease_scores`

    What needs two classes and finds one is left out.
    """
    rankings = [
        ("auroc", label, table, (table["actual"] == label).to_numpy(), table[label].to_numpy())
        for label in LABELS
    ]
    rankings += [("auroc_within", modality, *scored) for modality, *scored in _within(table)]
    result: dict = {}
    for name, key, rows, truth, score in rankings:
        if truth.any() and not truth.all():
            found = auroc(rows["patient_id"], truth, score, seed, draws)
            for field, value in found.as_dict(name).items():
                result.setdefault(field, {})[key] = value
    return result


def disease_scores(
    table: pd.DataFrame, modality: str
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return the rows of `modality` to rank, which show its disease, bool (n,), and their scores.

    The disease is COVID-19 on CT and tuberculosis on X-ray; images of a third class are left out.
    The score is p(disease) / (p(disease) + p(normal)), and 1/2 if both are 0: float64, (n,).
    """
    disease = DISEASES[modality]
    rows = table[(table["modality"] == modality) & table["actual"].isin([disease, "normal"])]
    share, total = rows[disease].to_numpy(), rows[[disease, "normal"]].sum(axis=1).to_numpy()
    score = np.divide(share, total, out=np.full(len(rows), 0.5), where=total > 0)
    return rows, (rows["actual"] == disease).to_numpy(), score


def auroc(
    patients: Sequence, truth: np.ndarray, score: np.ndarray, seed: int, draws: int = DRAWS
) -> Interval:
    """Return the AUROC with its interval; `truth`, bool (N,), holds both values.

    Near 1 percentiles of the draws are too close, so the limits are value plus or minus 1.96
    standard deviations of the draws on the logit scale. If less than a quarter of a patient's worth
    of pairs is ranked wrongly (or rightly), there is nothing to draw from, and the limits are those
    of a share of the smaller class's patients under Jeffreys' prior. A constant score is worth
    exactly 1/2.
    """
    value = float(roc_auc_score(truth, score))
    if np.ptp(score) == 0:
        return Interval(value, value, value)
    bootstrap = Bootstrap(patients, truth, seed, draws)
    return auroc_interval(value, auroc_draws(bootstrap, truth, score), bootstrap)


def auroc_interval(value: float, drawn: np.ndarray, bootstrap: Bootstrap) -> Interval:
    """Return the interval of an AUROC from its `drawn` values, (draws,); see `auroc`."""
    n = int(bootstrap.patients.min())
    quantiles = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    if n * min(value, 1 - value) < FEWEST_ERRORS:
        low, high = beta.ppf(quantiles, n * value + 0.5, n * (1 - value) + 0.5)
    else:
        edge = 0.5 / bootstrap.patients.prod()
        drawn = logit(np.clip(drawn, edge, 1 - edge))
        low, high = expit(logit(value) + drawn.std() * norm.ppf(quantiles))
    return Interval(value, min(float(low), value), max(float(high), value))


def auroc_draws(bootstrap: Bootstrap, truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the AUROC of each draw, (draws,): images sorted by score once, weighted by draw."""
    negatives = np.flatnonzero(~truth)[np.argsort(score[~truth], kind="stable")]
    lower, not_higher = (
        np.searchsorted(score[negatives], score[truth], side) for side in ("left", "right")
    )
    drawn = []
    for start in range(0, bootstrap.draws, DRAWS_AT_ONCE):
        # Whole numbers: exact in float32.
        weights = bootstrap.weights[start : start + DRAWS_AT_ONCE].T.astype(np.float32)
        positive = weights[bootstrap.patient[truth]]
        negative = weights[bootstrap.patient[negatives]]
        below = np.zeros((len(negative) + 1, negative.shape[1]), np.float32)
        np.cumsum(negative, axis=0, out=below[1:])
        ranked = below[lower] + below[not_higher]  # twice the negatives below: ties count half
        wins = np.einsum("nd,nd->d", positive, ranked, dtype=np.float64) / 2
        drawn.append(wins / (positive.sum(axis=0, dtype=np.float64) * below[-1]))
    return np.concatenate(drawn)


def thresholds(validation: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Choose thresholds on the answers to validation images: {modality: {target: threshold}}.

    An image is called diseased if its score (`disease_scores`) is at least the threshold.
    ``sensitivity_90`` is the highest threshold with a sensitivity of at least 90 %,
    ``specificity_70`` the lowest with a specificity of at least 70 % (UNREACHED if only a threshold
    that no image reaches has it). A modality without images of both classes is left out.
    """
    chosen = {}
    for modality, _, truth, score in _within(validation):
        if not truth.any() or truth.all():
            continue
        false_positive, sensitivity, cuts = roc_curve(truth, score, drop_intermediate=False)
        cuts = np.minimum(cuts, UNREACHED)  # the first is infinite
        chosen[modality] = {
            "sensitivity_90": float(cuts[sensitivity >= SENSITIVITY - ROUNDING].max()),
            "specificity_70": float(cuts[1 - false_positive >= SPECIFICITY - ROUNDING].min()),
        }
    return chosen


def operating_points(
    table: pd.DataFrame, chosen: dict[str, dict[str, float]], seed: int, draws: int = DRAWS
) -> list[dict]:
    """Return sensitivity and specificity at thresholds that were `chosen` on other images.

    One dict per modality and target: modality, target, threshold; sensitivity, sensitivity_low,
    sensitivity_high, likewise specificity; best; diseased and normal (numbers of images).
    ``best`` is what the best threshold on these very images would give: the specificity for
    ``sensitivity_90``, the sensitivity for ``specificity_70``; the distance is the price of a
    threshold that has to be chosen before. A modality without images of both classes is left out.
    """
    rows, best = [], thresholds(table)
    for modality, answers, truth, score in _within(table):
        if modality not in chosen or modality not in best:
            continue
        bootstrap = Bootstrap(answers["patient_id"], answers["actual"], seed, draws)
        counts = {"diseased": int(truth.sum()), "normal": int((~truth).sum())}
        for target, threshold in chosen[modality].items():
            row = {"modality": modality, "target": target, "threshold": threshold}
            row |= _rates(bootstrap, truth, score >= threshold, DISEASES[modality])
            called = score >= best[modality][target]
            own = ~called[~truth] if target == "sensitivity_90" else called[truth]
            rows.append(row | {"best": float(own.mean())} | counts)
    return rows


def _rates(
    bootstrap: Bootstrap, truth: np.ndarray, called: np.ndarray, disease: str
) -> dict[str, float]:
    """Return sensitivity and specificity of `called`, bool (n,), with their limits."""
    constant = np.full(2, called.all() or not called.any())
    drawn, _ = recall_draws(bootstrap, called == truth, constant)
    sensitivity, specificity = (
        percentile_interval(float(own), drawn[:, bootstrap.classes.index(label)])
        for label, own in ((disease, called[truth].mean()), ("normal", 1 - called[~truth].mean()))
    )
    return sensitivity.as_dict("sensitivity") | specificity.as_dict("specificity")


def _within(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, np.ndarray, np.ndarray]]:
    """Yield modality, rows, truth and score of each modality; see `disease_scores`."""
    for modality in DISEASES:
        yield modality, *disease_scores(table, modality)
