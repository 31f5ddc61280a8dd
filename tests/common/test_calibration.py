"""Temperature against a grid, calibration errors by hand, Wilson's interval against scipy's."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stages.common import calibration, intervals


def loss(logits: np.ndarray, labels: np.ndarray, at: float) -> float:
    """The negative log-likelihood, slide by slide, and the prior's part."""
    total = np.log(at) ** 2 / 2
    for row, label in zip(logits / at, labels, strict=True):
        total += np.log(np.exp(row - row[label]).sum())
    return total


@pytest.mark.parametrize("sureness", [0.3, 1.0, 4.0])
def test_temperature_is_the_best_of_a_grid(sureness: float) -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 3, 53)
    logits = generator.normal(size=(53, 3)) + 1.5 * np.eye(3)[labels]
    logits = logits * sureness + generator.normal(size=(53, 1))
    found = calibration.temperature(logits, labels)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 2001))
    best = grid[np.argmin([loss(logits, labels, at) for at in grid])]
    assert found == pytest.approx(best, rel=3e-3)
    assert all(loss(logits, labels, found) <= loss(logits, labels, at) + 1e-12 for at in grid)


def test_temperature_of_too_sure_a_head_is_its_factor() -> None:
    generator = np.random.default_rng(0)
    share = generator.uniform(0.02, 0.98, 20_000)
    labels = (generator.uniform(size=20_000) < share).astype(np.int64)
    logits = np.stack([np.zeros(20_000), np.log(share / (1 - share))], 1)
    assert calibration.temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    probability = np.exp(3 * logits) / np.exp(3 * logits).sum(1, keepdims=True)
    assert calibration.scaled(probability, 3.0)[:, 1] == pytest.approx(share, abs=1e-9)


def test_temperature_stays_finite_where_all_slides_are_right_or_wrong() -> None:
    logits = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert 0.5 < calibration.temperature(logits, np.array([0, 1])) < 1
    assert 1 < calibration.temperature(logits, np.array([1, 0])) < 5
    assert calibration.temperature(1000 * logits, np.array([1, 0])) == pytest.approx(20, rel=1e-3)


def test_few_slides_told_apart_do_not_make_later_ones_too_sure() -> None:
    generator = np.random.default_rng(3)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 2
        score = 2.5 * labels - 1.25 + generator.normal(size=count)
        return np.stack([np.zeros(count), 2.5 * score], 1), labels  # the right log-odds

    worse = []
    for _ in range(60):
        found = calibration.temperature(*drawn(8))
        later = drawn(400)
        worse.append((loss(*later, found) - loss(*later, 1.0)) / 400)
    assert np.mean(worse) < 0.05 and max(worse) < 0.2  # nats a slide


def test_certain_probabilities_stay_finite_after_scaling() -> None:
    assert calibration.scaled(np.array([[0.0, 1.0]]), 2.0).tolist() == [[pytest.approx(0), 1.0]]


@pytest.mark.parametrize("logits", [np.zeros((0, 2)), np.array([[0.0, np.inf]])])
def test_rejects_logits_without_a_temperature(logits: np.ndarray) -> None:
    with pytest.raises(ValueError, match="none or not finite: a temperature needs finite ones"):
        calibration.temperature(logits, np.zeros(len(logits), np.int64))


def test_expected_error_by_hand() -> None:
    share = np.array([0.05, 0.95, 0.95, 0.95, 0.35, 1.0])
    labels = np.array([0, 1, 1, 0, 1, 1])
    bins = calibration.reliability(np.stack([1 - share, share], 1), labels)
    assert bins.slides.tolist() == [1, 1, 4]  # 1.0 lies in the last bin
    assert bins.predicted.tolist() == pytest.approx([0.05, 0.35, 3.85 / 4])
    assert bins.observed.tolist() == [0, 1, 0.75]
    expected = (0.05 + 0.65 + 4 * (3.85 / 4 - 0.75)) / 6
    assert calibration.expected_error(bins) == pytest.approx(expected)


def test_more_classes_are_judged_by_the_called_one() -> None:
    probability = np.array([[0.5, 0.3, 0.2], [0.1, 0.55, 0.35], [0.2, 0.2, 0.6]])
    bins = calibration.reliability(probability, np.array([0, 2, 2]))
    expected = pd.DataFrame({"predicted": [0.525, 0.6], "observed": [0.5, 1.0], "slides": [2, 1]})
    pd.testing.assert_frame_equal(bins, expected)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 11), (50, 53), (5, 5)])
def test_wilsons_interval_is_scipys(right: int, count: int) -> None:
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert intervals.wilson(right / count, count) == pytest.approx(tuple(expected), abs=1e-12)


def test_percentiles_are_the_middle_95_of_100() -> None:
    assert intervals.percentile(np.arange(1001.0)) == pytest.approx((25, 975))
    assert intervals.percentile(np.ones(9)) is None
