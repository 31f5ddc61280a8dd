"""The figures of one run, and how they spread over runs; `stages.common.metrics` names them all."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

Labels = Int64[np.ndarray, " slide"]


def areas(labels: Labels, probability: Float[np.ndarray, "slide classes"]) -> dict[str, float]:
    """AUC and average precision, of class 1 or the mean of each class against the rest."""
    if probability.shape[1] == 2:
        truth, score = labels, probability[:, 1]
    else:
        truth, score = one_hot(labels, probability.shape[1]), probability
    return {
        "auc": float(roc_auc_score(truth, score)),
        "ap": float(average_precision_score(truth, score)),
    }


def brier(labels: Labels, probability: Float[np.ndarray, "slide classes"]) -> float:
    """Mean squared error of the probabilities over all classes, halved."""
    gap = probability - one_hot(labels, probability.shape[1])
    return float((gap**2).sum(1).mean() / 2)


def counts_of(labels: Labels, called: Labels, classes: int) -> Int64[np.ndarray, "actual called"]:
    """The confusion matrix."""
    return confusion_matrix(labels, called, labels=range(classes))


def shares(counts: Float[np.ndarray, "actual called"]) -> dict[str, float]:
    """Accuracies and recalls of a confusion matrix in which every class has slides."""
    recalls = np.diag(counts) / counts.sum(1)
    figures = {
        "accuracy": np.trace(counts) / counts.sum(),
        "majority_accuracy": counts.sum(1).max() / counts.sum(),
        "balanced_accuracy": recalls.mean(),
        "recall_macro": recalls.mean(),
    }
    if len(counts) == 2:
        figures |= {"recall": recalls[1], "specificity": recalls[0]}
    else:
        others = counts.sum() - counts.sum(1)
        called_falsely = counts.sum(0) - np.diag(counts)
        figures["specificity_macro"] = 1 - (called_falsely / others).mean()
    return {name: float(value) for name, value in figures.items()}


def one_hot(labels: Labels, classes: int) -> Int64[np.ndarray, "slide classes"]:
    """1 in the column of each slide's class."""
    return (labels[:, None] == np.arange(classes)).astype(np.int64)


def components(values: Float[np.ndarray, "split seed"]) -> dict[str, float]:
    """The standard deviation that seeds make, and the one that splits make beside it.

    The spread of the splits' means holds a part of the seeds' too, which is taken off; what is
    left is 0 where seeds explain it all. Absent: seed_sd with one seed, split_sd with one split.

    Source:
        Searle, Casella and McCulloch 1992, Variance Components, section 3.5: one-way analysis of
        variance with seeds inside of splits.
    """
    splits, seeds = values.shape
    found = {}
    within = values.var(axis=1, ddof=1).mean() if seeds > 1 else 0.0
    if seeds > 1:
        found["seed_sd"] = float(np.sqrt(within))
    if splits > 1:
        between = values.mean(1).var(ddof=1) - within / seeds
        found["split_sd"] = float(np.sqrt(max(0.0, between)))
    return found


def mean_of(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
