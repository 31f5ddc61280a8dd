"""Thresholds: the best on validation, and which of equals."""

import numpy as np
import pytest

from stages.common import thresholds


@pytest.mark.parametrize(
    ("chance", "expected"),
    [
        ([0.1, 0.2, 0.6, 0.9], 0.5),  # separated around 0.5
        ([0.1, 0.2, 0.3, 0.9], 0.25),  # best between 0.2 and 0.3
        ([0.6, 0.7, 0.8, 0.9], 0.75),  # best between 0.7 and 0.8
        ([0.4, 0.4, 0.4, 0.4], 0.5),  # nothing to choose between
        ([0.1, 0.8, 0.6, 0.9], 0.5),  # 0.35, 0.5 and 0.85 serve alike: the nearest to 0.5
        ([0.2, 0.6, 0.4, 0.8], 0.3),  # 0.3 and 0.7 serve alike, equally far: the lower
    ],
)
def test_the_threshold_has_the_best_balanced_accuracy(chance: list[float], expected: float) -> None:
    labels = np.array([0, 0, 1, 1])
    assert thresholds.balanced(labels, np.array(chance)) == pytest.approx(expected)


def test_screening_needs_a_slide_of_class_1() -> None:
    with pytest.raises(ValueError, match="of 3 validation slides none is of class 1"):
        thresholds.screening(np.zeros(3, np.int64), np.array([0.1, 0.2, 0.3]))
