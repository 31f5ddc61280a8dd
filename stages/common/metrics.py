"""Figures of merit of a binary classifier over slides."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

Labels = Int64[np.ndarray, " slide"]
Probability = Float[np.ndarray, " slide"]


def threshold_from(labels: Labels, probability: Probability) -> float:
    """The threshold with the highest balanced accuracy (Youden's index) on validation slides.

    Candidates are 0.5 and the midpoints between neighbouring probabilities. Few slides leave many
    equally good ones: of those the nearest to 0.5 is taken, then the lower, which misses fewer
    slides of class 1. A slide is called class 1 when its probability reaches the threshold.
    """
    levels = np.unique(probability)
    candidates = np.append((levels[1:] + levels[:-1]) / 2, 0.5)
    balanced = [balanced_accuracy_score(labels, probability >= at) for at in candidates]
    equal = candidates[np.isclose(balanced, max(balanced), rtol=0, atol=1e-12)]
    return float(min(equal, key=lambda at: (round(abs(at - 0.5), 12), at)))


def score(labels: Labels, probability: Probability, threshold: float) -> dict[str, float]:
    """The figures of one run.

    Returns:
        auc: area under the ROC curve.
        accuracy: share of slides called right at `threshold`.
        majority_accuracy: share of the larger class, what a constant answer reaches at best.
        balanced_accuracy: mean of the recalls of both classes.
        recall: of class 1, the sensitivity.
    """
    called = (probability >= threshold).astype(np.int64)
    positive = labels.mean()
    return {
        "auc": float(roc_auc_score(labels, probability)),
        "accuracy": float((called == labels).mean()),
        "majority_accuracy": float(max(positive, 1 - positive)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, called)),
        "recall": float(called[labels == 1].mean()),
    }


def spread(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (n - 1) of each figure over the runs."""
    values = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    return {
        name: {"mean": float(column.mean()), "sd": float(column.std(ddof=1))}
        for name, column in values.items()
    }


def mean_roc(labels: Labels, probabilities: Sequence[Probability]) -> Float[np.ndarray, "point 3"]:
    """The ROC curve averaged over runs at each false-positive rate; its area is the mean AUC.

    Returns:
        Rows (false-positive rate, true-positive rate, threshold), all finite, two for each rate:
        the lower and the upper end of the curve there. The threshold is the mean of the runs' (the
        first one lies just above the highest probability, where scikit-learn has infinity).

    Source:
        Fawcett 2006, https://doi.org/10.1016/j.patrec.2005.10.010, vertical averaging, algorithm
        3. Differs in keeping both ends of the vertical steps, where that has the upper only.
    """
    curves = [_finite_roc(labels, probability) for probability in probabilities]
    rates = np.unique(np.concatenate([curve[0] for curve in curves]))
    return np.mean([_at_rates(curve, rates) for curve in curves], axis=0)


def _finite_roc(labels: Labels, probability: Probability) -> tuple[np.ndarray, ...]:
    false_rate, true_rate, threshold = roc_curve(labels, probability, drop_intermediate=False)
    threshold[0] = np.nextafter(threshold[1], np.inf)
    return false_rate, true_rate, threshold


def _at_rates(
    curve: tuple[np.ndarray, ...], rates: Float[np.ndarray, " rate"]
) -> Float[np.ndarray, "point 3"]:
    false_rate, *columns = curve
    # Of equal abscissae np.interp takes the last: the upper end of a step, or mirrored the lower.
    upper = [np.interp(rates, false_rate, column) for column in columns]
    lower = [np.interp(-rates, -false_rate[::-1], column[::-1]) for column in columns]
    both = np.stack([[rates, *lower], [rates, *upper]])  # [end, column, rate]
    return both.transpose(2, 0, 1).reshape(-1, 3)
