"""Matching against the dense assignment, intervals by definition."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from stages.detectors import _score
from stages.detectors._score import Counts


def test_pairs_are_the_most_and_of_those_the_closest():
    """Against the dense assignment, whose costs put a pair above any distance."""
    rng = np.random.default_rng(11)
    for _ in range(200):
        first, second = (rng.uniform(0, 9, (rng.integers(1, 24), 2)) for _ in range(2))
        distance = cdist(first, second)
        reward = np.where(distance <= 2, 1000 - distance, 0)
        rows, columns = linear_sum_assignment(reward, maximize=True)
        near = distance[rows, columns] <= 2
        found = _score.pairs(first, second, 2.0)
        assert len(found) == near.sum()
        assert len(set(found[:, 0].tolist())) == len(set(found[:, 1].tolist())) == len(found)
        ours = distance[found[:, 0], found[:, 1]]
        assert ours.sum() == pytest.approx(distance[rows, columns][near].sum(), abs=1e-9)


def test_pairs_a_point_on_a_point_and_prefers_it():
    points = np.array([[5.0, 5], [6, 5], [4, 5]])
    assert _score.pairs(points, points[::-1].copy(), 3.0).tolist() == [[0, 2], [1, 1], [2, 0]]
    assert _score.pairs(points[:0], points, 3.0).shape == (0, 2)


def test_matches_five_thousand_in_a_crowd():
    """Every point has forty within the radius; the truth, shifted a little, is found again."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 627, (5000, 2))
    order = rng.permutation(5000)
    found = _score.pairs(truth[order] + 1e-4, truth, 31.7)
    assert np.array_equal(found[:, 1], order)


def test_intervals_are_percentiles_over_resampled_images():
    counts = [Counts(3, 4, 6), Counts(0, 0, 2), Counts(5, 9, 5), Counts(0, 0, 0), Counts(2, 3, 2)]
    areas = [0.1, 0.2, 0.1, 0.3, 0.05]
    summary = _score.summarise(counts, areas, seed=3)
    generator = np.random.default_rng(3)
    pooled, macro = [], []
    for _ in range(_score.RESAMPLES):
        drawn = generator.integers(len(counts), size=len(counts)).tolist()
        total = Counts(0, 0, 0)
        for at in drawn:
            total += counts[at]
        false = total.found - total.matched
        pooled.append((total.precision, total.f1, false / sum(areas[at] for at in drawn)))
        macro.append(
            (
                np.mean([counts[at].precision for at in drawn]),
                np.mean([counts[at].f1 for at in drawn]),
                np.mean([(counts[at].found - counts[at].matched) / areas[at] for at in drawn]),
            )
        )
    for way, draws in (("pooled", pooled), ("macro", macro)):
        for name, column in zip(
            ("precision", "f1", "false_per_mm2"), np.array(draws).T, strict=True
        ):
            low, high = np.percentile(column, [2.5, 97.5])
            assert summary[way][name]["low"] == pytest.approx(low, abs=1e-12)
            assert summary[way][name]["high"] == pytest.approx(high, abs=1e-12)
            assert low < summary[way][name]["value"] < high
    assert summary == _score.summarise(counts, areas, seed=3)
