"""Ranking by probability (AUROC) and operating points whose thresholds come from validation."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import beta, norm
from sklearn.metrics import roc_auc_score, roc_curve

from chest.core.labels import DISEASES, LABELS
from chest.evaluation.intervals import DRAWS, LEVEL, Bootstrap, Interval, around, recall_draws

# The WHO's target for a triage test of tuberculosis: sensitivity 90 %, specificity 70 % (WHO 2014,
# high-priority target product profiles for new tuberculosis diagnostics).
SENSITIVITY, SPECIFICITY = 0.90, 0.70
TARGETS = ("sensitivity_90", "specificity_70")
ABOVE = 1.01  # threshold that no score reaches
QUARTER = 0.25  # of a patient; see `auroc`
ENOUGH = 1e-9  # 7/10 must count as 70 %


def roc_metrics(table: pd.DataFrame, seed: int, draws: int = DRAWS) -> dict:
    """Return the AUROCs of one system's answers (see `predictions.System`) with 95 % intervals.

    The result is a nested dict of floats from 0 to 1:

    ``auroc``, ``auroc_low``, ``auroc_high``  {class: that class against the others}
    ``auroc_within``, ``…_low``, ``…_high``   {modality: its disease against normal}; see
        `disease_scores`
    ``triage``  tuberculosis against normal within X-ray: the best that any threshold gives on these
        very images; for thresholds chosen on validation see `operating_points`

    What needs two classes and finds one is left out.
    """
    rankings = {
        ("auroc", label): (table, table["actual"] == label, table[label]) for label in LABELS
    }
    rankings |= {("auroc_within", modality): x for modality, *x in _within(table)}
    result: dict = {}
    for (name, key), (rows, truth, score) in rankings.items():
        truth = np.asarray(truth)
        if truth.any() and not truth.all():
            found = auroc(rows, truth, np.asarray(score), seed, draws)
            for suffix in ("", "_low", "_high"):
                limit = getattr(found, suffix[1:] or "value")
                result.setdefault(name + suffix, {})[key] = limit
    for modality, _, truth, score in _within(table):
        if modality == "xray" and truth.any() and not truth.all():
            result["triage"] = best_points(truth, score)
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
    rows: pd.DataFrame, truth: np.ndarray, score: np.ndarray, seed: int, draws: int = DRAWS
) -> Interval:
    """Return the AUROC with its interval; `rows` has patient_id, `truth` holds both values.

    Near 1 percentiles of the draws are too close, so the limits are value plus or minus 1.96
    standard deviations of the draws on the logit scale. If less than a quarter of a patient's worth
    of pairs is ranked wrongly (or rightly), there is nothing to draw from, and the limits are those
    of a share of the smaller class's patients under Jeffreys' prior. A constant score is worth
    exactly 1/2.
    """
    value = float(roc_auc_score(truth, score))
    if np.ptp(score) == 0:
        return Interval(value, value, value)
    classes = np.where(truth, LABELS[0], LABELS[1])  # any two names
    bootstrap = Bootstrap(rows.assign(actual=classes), seed, draws)
    n = int(bootstrap.patients.min())
    quantiles = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    if n * min(value, 1 - value) < QUARTER:
        low, high = beta.ppf(quantiles, n * value + 0.5, n * (1 - value) + 0.5)
    else:
        edge = 0.5 / bootstrap.patients.prod()
        drawn = logit(np.clip(_auroc_draws(bootstrap, truth, score), edge, 1 - edge))
        low, high = expit(logit(value) + drawn.std() * norm.ppf(quantiles))
    return Interval(value, min(float(low), value), max(float(high), value))


def _auroc_draws(bootstrap: Bootstrap, truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return the AUROC of each draw, (draws,): images sorted by score once, weighted by draw."""
    order = np.argsort(score, kind="stable")
    patient, truth, score = bootstrap.patient[order], truth[order], score[order]
    starts = np.flatnonzero(np.r_[True, np.diff(score) > 0])  # of each group of equal scores
    drawn = np.empty(bootstrap.draws)
    for start in range(0, bootstrap.draws, step := max(1, 1_000_000 // len(score))):
        part = slice(start, start + step)
        weights = bootstrap.weights[part][:, patient].astype(np.float64)
        positive = np.add.reduceat(weights * truth, starts, axis=1)
        negative = np.add.reduceat(weights * ~truth, starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2  # ties count half
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        drawn[part] = (positive * below).sum(axis=1) / pairs
    return drawn


def best_points(truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Return the best sensitivity at a specificity of at least 70 %, and the reverse at 90 %.

    The threshold is the best for these very images, so both flatter.
    """
    false_positive, sensitivity, _ = roc_curve(truth, score, drop_intermediate=False)
    specificity = 1 - false_positive
    return {
        "sensitivity_at_specificity_70": float(
            sensitivity[specificity >= SPECIFICITY - ENOUGH].max()
        ),
        "specificity_at_sensitivity_90": float(
            specificity[sensitivity >= SENSITIVITY - ENOUGH].max()
        ),
    }


def thresholds(validation: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Choose thresholds on the answers to validation images: {modality: {target: threshold}}.

    An image is called diseased if its score (`disease_scores`) is at least the threshold.
    ``sensitivity_90`` is the highest threshold with a sensitivity of at least 90 %,
    ``specificity_70`` the lowest with a specificity of at least 70 % (ABOVE if only a threshold
    that no image reaches has it). A modality without images of both classes is left out.
    """
    chosen = {}
    for modality, _, truth, score in _within(validation):
        if not truth.any() or truth.all():
            continue
        false_positive, sensitivity, cuts = roc_curve(truth, score, drop_intermediate=False)
        cuts = np.minimum(cuts, ABOVE)  # the first is infinite
        chosen[modality] = {
            "sensitivity_90": float(cuts[sensitivity >= SENSITIVITY - ENOUGH].max()),
            "specificity_70": float(cuts[1 - false_positive >= SPECIFICITY - ENOUGH].min()),
        }
    return chosen


def operating_points(
    table: pd.DataFrame,
    thresholds: dict[str, dict[str, float]],
    seed: int,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """Return sensitivity and specificity at thresholds that were chosen on other images.

    One row per modality and target: modality, target, threshold, sensitivity, sensitivity_low,
    sensitivity_high, specificity, specificity_low, specificity_high, best, and the numbers
    of images diseased and normal.
    ``best`` is what the best threshold on these very images would give: the specificity for
    ``sensitivity_90``, the sensitivity for ``specificity_70``; the distance is the price of a
    threshold that has to be chosen before. A modality without images of both classes is left out.
    """
    rows = []
    for modality, answers, truth, score in _within(table):
        if modality not in thresholds or not truth.any() or truth.all():
            continue
        bootstrap = Bootstrap(answers, seed, draws)
        best = best_points(truth, score)
        bests = (best["specificity_at_sensitivity_90"], best["sensitivity_at_specificity_70"])
        for target, own in zip(TARGETS, bests, strict=True):
            threshold = thresholds[modality][target]
            row = {"modality": modality, "target": target, "threshold": threshold}
            row |= _rates(bootstrap, truth, score >= threshold, DISEASES[modality])
            counts = {"diseased": int(truth.sum()), "normal": int((~truth).sum())}
            rows.append(row | {"best": own} | counts)
    return pd.DataFrame(rows, columns=POINT_COLUMNS)


POINT_COLUMNS = (
    *("modality", "target", "threshold"),
    *("sensitivity", "sensitivity_low", "sensitivity_high"),
    *("specificity", "specificity_low", "specificity_high"),
    *("best", "diseased", "normal"),
)


def _rates(
    bootstrap: Bootstrap, truth: np.ndarray, called: np.ndarray, disease: str
) -> dict[str, float]:
    """Return sensitivity and specificity of `called`, bool (n,), with their limits."""
    constant = np.full(2, called.all() or not called.any())
    recalls, _ = recall_draws(bootstrap, called == truth, constant)
    result = {}
    for name, label, own in (
        ("sensitivity", disease, called[truth].mean()),
        ("specificity", "normal", 1 - called[~truth].mean()),
    ):
        found = around(float(own), recalls[:, bootstrap.classes.index(label)])
        result |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return result


def _within(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, np.ndarray, np.ndarray]]:
    """Yield modality, rows, truth and score of each modality; see `disease_scores`."""
    for modality in DISEASES:
        yield modality, *disease_scores(table, modality)
