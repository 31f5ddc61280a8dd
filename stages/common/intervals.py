"""Confidence intervals: Wilson's for a share, and resampled patients for everything else."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from scipy import stats

from stages.common.scores import Scores

CONFIDENCE = 0.95
QUANTILE = float(stats.norm.ppf((1 + CONFIDENCE) / 2))  # 1.96
RESAMPLES = 2000


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` independent ones.

    scipy's `binomtest` has it for whole numbers; a share averaged over repeats is none.

    Source:
        Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    ratio = QUANTILE**2 / count
    centre = (share + ratio / 2) / (1 + ratio)
    half = np.sqrt(share * (1 - share) * ratio + ratio**2 / 4) / (1 + ratio)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def resamples(
    folds: Sequence[Scores], patients: np.ndarray, seed: int, count: int = RESAMPLES
) -> Int64[np.ndarray, "resample patient"]:
    """How often each patient is drawn, with replacement, in each of `count` resamples.

    Patients are drawn within strata, those whose slides are of the same classes: each resample has
    as many patients of each class as the cohort.

    Args:
        folds: The test slides of every split; a patient has the same slides in each repeat.
        patients: All of them, sorted, as from `stages.common.pairs.patients_of`.
        seed: The same one gives the same draws, so that encoders meet on the same patients.
        count: Resamples.
    """
    generator = np.random.default_rng(seed)
    strata = _strata(folds, patients)
    counts = np.zeros((count, len(patients)), np.int64)
    for stratum in np.unique(strata):
        chosen = np.flatnonzero(strata == stratum)
        even = np.full(len(chosen), 1 / len(chosen))
        counts[:, chosen] = generator.multinomial(len(chosen), even, count)
    return counts


def _strata(folds: Sequence[Scores], patients: np.ndarray) -> np.ndarray:
    """A number for each patient that says which classes its slides are of."""
    classes = folds[0].probability.shape[2]
    has = np.zeros((len(patients), classes), bool)
    for fold in folds:
        has[np.searchsorted(patients, fold.patient), fold.label] = True
    return np.unique(has, axis=0, return_inverse=True)[1].reshape(-1)


def percentile(values: Float64[np.ndarray, " resample"]) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; None where they are all alike and say nothing."""
    if np.ptp(values) < 1e-12:
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
