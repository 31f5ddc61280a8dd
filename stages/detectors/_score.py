"""How good found centroids are: one-to-one pairs with annotated ones, rates, and their spread."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import KDTree

RATES = ("precision", "recall", "f1", "false_per_mm2")
RESAMPLES = 2000
LEVEL = (2.5, 97.5)  # percentiles of the 95 % interval


@dataclass(frozen=True)
class Counts:
    """Outcome of matching; adds up over patches."""

    matched: int
    found: int
    annotated: int

    def __add__(self, other: "Counts") -> "Counts":
        """The counts of both."""
        return Counts(
            self.matched + other.matched,
            self.found + other.found,
            self.annotated + other.annotated,
        )

    @property
    def precision(self) -> float:
        """Share of what was found that is annotated; 1 when nothing was found."""
        return self._rate("precision")

    @property
    def recall(self) -> float:
        """Share of what is annotated that was found; 1 when nothing is annotated."""
        return self._rate("recall")

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 when there was nothing and nothing was found."""
        return self._rate("f1")

    def _rate(self, name: str) -> float:
        counted = np.array([self.matched, self.found, self.annotated, 1.0])
        return float(rates(counted)[RATES.index(name)])


def match(
    found: Float[np.ndarray, "found 2"], annotated: Float[np.ndarray, "annotated 2"], radius: float
) -> Counts:
    """Count the pairs of `pairs`."""
    return Counts(len(pairs(found, annotated, radius)), len(found), len(annotated))


def pairs(
    found: Float[np.ndarray, "found 2"], annotated: Float[np.ndarray, "annotated 2"], radius: float
) -> Int64[np.ndarray, "pair 2"]:
    """The largest one-to-one matching of points within `radius`, of those the closest in sum.

    An assignment problem (Kuhn's, as in the Hungarian method), on near pairs only: each found
    point takes an annotated one, at a cost below 3, or stays alone, at a cost that no saving of
    distance outweighs.

    Args:
        found: (x, y) of detections.
        annotated: (x, y) of the truth, in the same unit.
        radius: Largest distance of a pair, in that unit; a pair at exactly `radius` matches.

    Returns:
        A row (found, annotated) for each pair, in the order of found.
    """
    if not len(found) or not len(annotated):
        return np.empty((0, 2), np.int64)
    near = KDTree(found).sparse_distance_matrix(KDTree(annotated), radius, output_type="ndarray")
    alone = np.arange(len(found))
    rows = np.concatenate([near["i"], alone])
    columns = np.concatenate([near["j"], len(annotated) + alone])
    # Above 0, which a sparse matrix would drop.
    closeness = 1 + near["v"] / max(radius, np.finfo(float).tiny)
    cost = np.concatenate([closeness, np.full(len(found), min(len(found), len(annotated)) + 3.0)])
    shape = (len(found), len(annotated) + len(found))
    row, column = min_weight_full_bipartite_matching(csr_array((cost, (rows, columns)), shape))
    taken = column < len(annotated)
    return np.stack([row[taken], column[taken]], axis=1).astype(np.int64)


def summarise(
    counts: Sequence[Counts], area_mm2: Sequence[float], seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Rates of a set of images, each with its bootstrap interval; the images are the unit.

    Percentile bootstrap (Efron 1979): images are drawn with replacement, as many as there are.

    Args:
        counts: One an image.
        area_mm2: Of each image.
        seed: Of the draws.

    Returns:
        "pooled" (counts summed over images) and "macro" (mean over images) -> rate (`RATES`) ->
        "value", "low" and "high".
    """
    table = np.array(
        [(c.matched, c.found, c.annotated, mm2) for c, mm2 in zip(counts, area_mm2, strict=True)],
        dtype=np.float64,
    )
    table = np.concatenate([table, rates(table)], axis=1)
    generator, count = np.random.default_rng(seed), len(table)
    draws = (generator.integers(count, size=count) for _ in range(RESAMPLES))
    sums = np.stack([np.bincount(draw, minlength=count) @ table for draw in draws])
    whole = table.sum(axis=0)
    return {
        "pooled": _intervals(rates(whole[:4]), rates(sums[:, :4])),
        "macro": _intervals(whole[4:] / count, sums[:, 4:] / count),
    }


def rates(counted: Float64[np.ndarray, "*rows 4"]) -> Float64[np.ndarray, "*rows 4"]:
    """`RATES` from matched, found, annotated, mm2; shares of nothing are 1."""
    matched, found, annotated, area_mm2 = np.moveaxis(counted, -1, 0)
    return np.stack(
        [
            _share(matched, found),
            _share(matched, annotated),
            _share(2 * matched, found + annotated),
            (found - matched) / area_mm2,
        ],
        axis=-1,
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)


def _intervals(
    value: Float64[np.ndarray, " rate"], draws: Float64[np.ndarray, "draw rate"]
) -> dict[str, dict[str, float]]:
    ends = np.percentile(draws, LEVEL, axis=0)
    return {
        name: {"value": float(value[at]), "low": float(ends[0, at]), "high": float(ends[1, at])}
        for at, name in enumerate(RATES)
    }
