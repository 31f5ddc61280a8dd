"""How good found centroids are: one-to-one matching with annotated ones within a radius."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist


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
        return self.matched / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of what is annotated that was found; 1 when nothing is annotated."""
        return self.matched / self.annotated if self.annotated else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 when there was nothing and nothing was found."""
        total = self.found + self.annotated
        return 2 * self.matched / total if total else 1.0


def match(
    found: Float[np.ndarray, "found 2"], annotated: Float[np.ndarray, "annotated 2"], radius: float
) -> Counts:
    """Count the largest one-to-one matching of points that lie within `radius` of each other.

    Args:
        found: (x, y) of detections.
        annotated: (x, y) of the truth, in the same unit.
        radius: Largest distance of a pair, in that unit; a pair at exactly `radius` matches.
    """
    near = cdist(found, annotated) <= radius
    # Maximising the number of near pairs, not their closeness: greedy matching can lose some.
    rows, columns = linear_sum_assignment(near, maximize=True)
    return Counts(int(near[rows, columns].sum()), len(found), len(annotated))
