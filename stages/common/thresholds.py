"""Thresholds on the probability of class 1, chosen on validation slides."""

import numpy as np
from jaxtyping import Float, Int64

Labels = Int64[np.ndarray, " slide"]
Probability = Float[np.ndarray, " slide"]
SENSITIVITY = 0.95  # of screening


def balanced(labels: Labels, probability: Probability) -> float:
    """The threshold with the highest balanced accuracy (Youden's index).

    Candidates are 0.5 and the midpoints between neighbouring probabilities. Few slides leave many
    equally good ones: of those the nearest to 0.5 is taken, then the lower, which misses fewer
    slides of class 1. A slide is called class 1 when its probability reaches the threshold.
    """
    return _best(labels, probability, (0.5, 0.5))


def accurate(labels: Labels, probability: Probability) -> float:
    """The threshold with the highest accuracy, candidates and ties as in `balanced`."""
    positive = float(np.mean(labels))
    return _best(labels, probability, (1 - positive, positive))


def _best(labels: Labels, probability: Probability, weights: tuple[float, float]) -> float:
    """The best mean of specificity and recall by `weights`."""
    levels = np.unique(probability)
    candidates = np.append((levels[1:] + levels[:-1]) / 2, 0.5)
    negative, positive = (np.sort(probability[labels == at]) for at in (0, 1))
    right = np.searchsorted(negative, candidates) / max(1, len(negative))
    found = 1 - np.searchsorted(positive, candidates) / max(1, len(positive))
    reached = weights[0] * right + weights[1] * found
    equal = candidates[np.isclose(reached, max(reached), rtol=0, atol=1e-12)]
    return float(min(equal, key=lambda at: (round(abs(at - 0.5), 12), at)))


def screening(labels: Labels, probability: Probability) -> float:
    """The highest threshold that calls at least 95 % of the class-1 slides.

    Raises:
        ValueError: there is no slide of class 1.
    """
    falling = np.sort(probability[labels == 1])[::-1]
    if len(falling) == 0:
        raise ValueError(
            f"of {len(labels)} validation slides none is of class 1: the threshold of screening "
            "needs some; add patients of that class and rerun `dvc repro split`"
        )
    return float(falling[int(np.ceil(SENSITIVITY * len(falling) - 1e-9)) - 1])
