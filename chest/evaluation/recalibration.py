"""What a few labelled images of a new hospital bring back.

`n` images are drawn, of both classes, and the others are answered. Two ways to use them:

``threshold``   all scores are shifted by the same amount on the logit scale, the one of the lowest
                log loss: it moves the threshold and keeps the order of the images
``linear``      a logistic regression on frozen features, trained on the old hospital's images and
                the new ones, both hospitals weighing the same
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

SIZES = (5, 10, 20, 50)
DRAWS = 20
CLIP = 1e-4  # of scores, before the logit
MOST = 10.0  # shift of the logits
COLUMNS = ("labelled", "draw", "uar", "auroc", "brier")

Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def recalibrate_threshold(truth: np.ndarray, score: np.ndarray, seed: int) -> pd.DataFrame:
    """Return the figures of `COLUMNS` on the images that were not drawn, also without any (0).

    `truth`, bool (n,), says which images of the new hospital show the disease; `score`, (n,), is
    the system's probability of it.
    """
    values = logit(np.clip(score, CLIP, 1 - CLIP))

    def answer(drawn: np.ndarray, rest: np.ndarray) -> np.ndarray:
        own, weights = values[drawn], balanced(truth[drawn])

        def loss(shift: float) -> float:
            return log_loss(truth[drawn], expit(own + shift), sample_weight=weights)

        return expit(values[rest] + minimize_scalar(loss, bounds=(-MOST, MOST)).x)

    return _tabulate(truth, score, answer, seed)


def recalibrate_layer(
    old: tuple[np.ndarray, np.ndarray],
    new: tuple[np.ndarray, np.ndarray],
    score: np.ndarray,
    c: float,
    seed: int,
) -> pd.DataFrame:
    """Do the same with a linear layer on features; see the module.

    `old` and `new` are features (n, K) and truth (n,) of the two hospitals' images; `score` is the
    answer without any labelled image, and `c` the regularisation that was chosen for it.
    """
    scaler = StandardScaler().fit(old[0])
    known, features = (scaler.transform(part[0]) for part in (old, new))

    def answer(drawn: np.ndarray, rest: np.ndarray) -> np.ndarray:
        x, y = np.vstack([known, features[drawn]]), np.concatenate([old[1], new[1][drawn]])
        # Of each hospital, both classes weigh the same.
        weights = np.concatenate([balanced(old[1]), balanced(new[1][drawn])]) * len(known) / 2
        model = LogisticRegression(C=c, max_iter=1000).fit(x, y, weights)
        return model.predict_proba(features[rest])[:, 1]

    return _tabulate(new[1], score, answer, seed)


def balanced(truth: np.ndarray) -> np.ndarray:
    """Return weights that sum to 1, half of it for each class."""
    return np.where(truth, 0.5 / truth.sum(), 0.5 / (~truth).sum())


def draw(truth: np.ndarray, seed: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the number of labelled images, the draw, and their rows, int64, of both classes.

    A draw's images are the first of one order, which begins with one image of each class.
    """
    for number in range(DRAWS):
        order = np.random.default_rng([seed, number]).permutation(len(truth))
        first = [order[truth[order] == value][0] for value in (True, False)]
        order = np.concatenate([first, order[~np.isin(order, first)]])
        for size in SIZES:
            if size <= len(truth) / 2:  # the others are answered
                yield size, number, order[:size]


def _tabulate(truth: np.ndarray, score: np.ndarray, answer: Answer, seed: int) -> pd.DataFrame:
    rows = [(0, 0, *_figures(truth, score))]
    for size, number, drawn in draw(truth, seed):
        rest = np.setdiff1d(np.arange(len(truth)), drawn)
        rows.append((size, number, *_figures(truth[rest], answer(drawn, rest))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _figures(truth: np.ndarray, score: np.ndarray) -> Sequence[float]:
    """Return UAR at 1/2, AUROC and the Brier score."""
    uar = balanced_accuracy_score(truth, score >= 0.5)
    return uar, roc_auc_score(truth, score), np.mean((score - truth) ** 2)
