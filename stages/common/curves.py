"""The curves of one encoder and head as tables, for DVC's plots and for the report."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from sklearn.metrics import precision_recall_curve, roc_curve

from stages.common import calibration
from stages.common.scores import Scores

POINTS = 150  # of a curve that people look at; hundreds of folds have thousands
Truth = Bool[np.ndarray, " slide"]
Probability = Float[np.ndarray, " slide"]


def roc(folds: Sequence[Scores]) -> pd.DataFrame:
    """The ROC curve averaged over runs at each false-positive rate; its area is the mean AUC.

    For more than two classes the one-vs-rest curves are averaged too.

    Returns:
        Columns fpr, tpr, threshold, all finite; two rows for each rate: the lower and the upper end
        of the curve there. The threshold is the mean of the runs' (the first one lies just above
        the highest probability, where scikit-learn has infinity).

    Source:
        Fawcett 2006, https://doi.org/10.1016/j.patrec.2005.10.010, vertical averaging, algorithm
        3. Differs in keeping both ends of the vertical steps, where that has the upper only.
    """
    curves = _of_runs(folds, _finite_roc)
    rates = np.unique(np.concatenate([curve[0] for curve in curves]))
    rows = np.mean([_at_rates(curve, rates) for curve in curves], axis=0)
    return pd.DataFrame(rows, columns=["fpr", "tpr", "threshold"])


def pr(folds: Sequence[Scores]) -> pd.DataFrame:
    """Precision against recall, averaged over runs as steps; its area is the mean AP.

    Returns:
        Columns recall and precision; two rows for each step, its left and its right end.
    """
    curves = _of_runs(folds, _steps)
    ends = np.unique(np.concatenate([curve[0] for curve in curves]))
    # At a recall in (ends[i - 1], ends[i]] a run has the precision of its first point that reaches.
    heights = [height[np.searchsorted(recall, ends)] for recall, height in curves]
    starts = np.concatenate([[0.0], ends[:-1]])
    recall = np.stack([starts, ends], 1).reshape(-1)
    return pd.DataFrame({"recall": recall, "precision": np.repeat(np.mean(heights, axis=0), 2)})


def calibrated(folds: Sequence[Scores]) -> pd.DataFrame:
    """Reliability before and after temperature scaling, over the test slides of all runs.

    Returns:
        Columns scaling (before or after), predicted, observed, slides.
    """
    before, after, labels = pooled(folds)
    tables = [
        calibration.reliability(probability, labels).assign(scaling=name)
        for name, probability in (("before", before), ("after", after))
    ]
    return pd.concat(tables)[["scaling", "predicted", "observed", "slides"]].reset_index(drop=True)


def confusion(folds: Sequence[Scores], classes: Sequence[str]) -> pd.DataFrame:
    """Columns actual and predicted by the seed ensemble, one row a slide and repeat."""
    ensembles = [fold.ensemble() for fold in folds]
    names = np.array(classes, dtype=object)
    tables = [
        pd.DataFrame({"actual": names[fold.label], "predicted": names[fold.called()[0]]})
        for fold in ensembles
    ]
    return pd.concat(tables, ignore_index=True)


def thinned(table: pd.DataFrame) -> pd.DataFrame:
    """At most POINTS rows, evenly taken, with the first and the last."""
    if len(table) <= POINTS:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, POINTS).round().astype(int)]


def pooled(folds: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [slide, classes] before and after scaling, and labels, over seeds and splits.

    Few test slides leave a bin of one run with a slide or two: its gap would be noise.
    """
    before = np.concatenate([of_seed for fold in folds for of_seed in fold.probability])
    after = np.concatenate(
        [
            calibration.scaled(of_seed, by)
            for fold in folds
            for of_seed, by in zip(fold.probability, fold.temperature, strict=True)
        ]
    )
    return (
        before,
        after,
        np.concatenate([np.tile(fold.label, len(fold.probability)) for fold in folds]),
    )


def _of_runs(folds: Sequence[Scores], curve: Callable[[Truth, Probability], tuple]) -> list[tuple]:
    """The curve of each split, seed and class against the rest."""
    classes = folds[0].probability.shape[2]
    return [
        curve(fold.label == at, of_seed[:, at])
        for fold in folds
        for of_seed in fold.probability
        for at in ([1] if classes == 2 else range(classes))
    ]


def _steps(truth: Truth, probability: Probability) -> tuple[np.ndarray, np.ndarray]:
    """Rising recalls and, for each, the precision of the first point that reaches it."""
    precision, recall, _ = precision_recall_curve(truth, probability)
    recall, precision = recall[-2::-1], precision[-2::-1]  # without (0, 1), which no threshold has
    first = np.concatenate([[recall[0] > 0], np.diff(recall) > 0])
    return recall[first], precision[first]


def _finite_roc(truth: Truth, probability: Probability) -> tuple[np.ndarray, ...]:
    false_rate, true_rate, threshold = roc_curve(truth, probability, drop_intermediate=False)
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
