"""Encoders against each other under one head, on the same slides: the effect first, then p.

Every test is two-sided and for the difference `encoder - other`. Which one gives `p` is fixed by
the protocol, before any number is seen: over folds the corrected resampled t, which counts that
another training set would have given another head; on one split DeLong's, which cannot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float64
from scipy import stats

from stages.common import intervals, pairs
from stages.common.scores import Scores

Folds = list[Scores]
TESTS = ("delong", "bootstrap", "mcnemar", "resampled_t")


@dataclass(frozen=True)
class Difference:
    """An effect with its 95 % interval and p; NaN where nothing tells them."""

    value: float
    low: float
    high: float
    p: float


def table(
    cells: dict[tuple[str, str], Folds], reference: str, seed: int, resamples: int
) -> pd.DataFrame:
    """One row for each head and pair of encoders.

    Args:
        cells: The test scores of every split by (encoder, head).
        reference: The encoder that all others are compared with; empty: every pair.
        seed: Of the resamples.
        resamples: Their number.

    Returns:
        Columns head, encoder, other; auc, auc_other, auc_difference with _low and _high by the
        test of the column `test`, p of that test and p_holm, corrected for all rows; the
        difference's bootstrap interval; only_encoder_right and only_other_right (slides);
        p_<test> and p_<test>_holm of every test there is. A p is NaN (an empty cell) where one
        patient of a class leaves DeLong's variance unknown; so are the ends of a difference without
        spread, as of two encoders that order all slides alike.

    Raises:
        ValueError: two encoders were scored on different slides, or the reference is none of them.
    """
    rows = [
        {"head": head, "encoder": one, "other": other}
        | compared(cells[one, head], cells[other, head], seed, resamples, f"{one} and {other}")
        for head in dict.fromkeys(head for _, head in cells)
        for one, other in _chosen(list(dict.fromkeys(name for name, _ in cells)), reference)
    ]
    found = pd.DataFrame(rows, columns=None if rows else ["head", "encoder", "other", "test"])
    for name in [f"p_{test}" for test in TESTS if f"p_{test}" in found]:
        found[f"{name}_holm"] = holm(found[name].to_numpy())
    if rows:
        at = found.columns.get_loc("p") + 1
        found.insert(at, "p_holm", holm(found["p"].to_numpy()))
    return found


def _chosen(encoders: Sequence[str], reference: str) -> list[tuple[str, str]]:
    if not reference:
        return list(combinations(encoders, 2))
    if reference not in encoders:
        raise ValueError(
            f"compare.reference is {reference}: it must be empty or one of embed.encoders, "
            f"{', '.join(encoders)}"
        )
    return [(reference, other) for other in encoders if other != reference]


def compared(one: Folds, other: Folds, seed: int, resamples: int, names: str) -> dict[str, object]:
    """Every effect and p of one pair of encoders, see `table`."""
    _check_same(one, other, names)
    mine, theirs = pairs.pairs_of(one), pairs.pairs_of(other)
    gaps = [left - right for left, right in zip(mine, theirs, strict=True)]
    patients = pairs.patients_of(one)
    found = {
        "delong": delong(gaps),
        "bootstrap": bootstrap(gaps, intervals.resamples(one, patients, seed, resamples)),
    }
    folds = len({fold.fold for fold in one})
    if folds > 1:
        by_split = np.array([gap.wins.mean() for gap in gaps]).reshape(len(one), -1).mean(1)
        found["resampled_t"] = resampled_t(by_split, folds)
    test = "resampled_t" if folds > 1 else "delong"
    p_mcnemar, only_one, only_other = mcnemar(*(_right(folds) for folds in (one, other)))
    return {
        "auc": pairs.auc(mine),
        "auc_other": pairs.auc(theirs),
        "auc_difference": found[test].value,
        "auc_difference_low": found[test].low,
        "auc_difference_high": found[test].high,
        "test": test,
        "p": found[test].p,
        "bootstrap_low": found["bootstrap"].low,
        "bootstrap_high": found["bootstrap"].high,
        "only_encoder_right": only_one,
        "only_other_right": only_other,
        "p_mcnemar": p_mcnemar,
        **{f"p_{name}": difference.p for name, difference in found.items()},
    }


def _check_same(one: Folds, other: Folds, names: str) -> None:
    splits = [[(fold.repeat, fold.fold) for fold in folds] for folds in (one, other)]
    same = splits[0] == splits[1] and all(
        np.array_equal(left.slide_id, right.slide_id)
        and np.array_equal(left.label, right.label)
        and np.array_equal(left.patient, right.patient)
        for left, right in zip(one, other, strict=True)
    )
    if not same:
        raise ValueError(
            f"the encoders {names} were not scored on the same splits, slides, patients and "
            "labels: run `dvc repro evaluate` for both"
        )


def delong(gaps: Sequence[pairs.Pairs]) -> Difference:
    """DeLong's test of a difference of AUCs, over patients and given the trained heads."""
    found = pairs.variance(gaps)
    error = np.nan if found is None else np.sqrt(found)
    return _difference(pairs.auc(gaps), float(error), stats.norm)


def bootstrap(gaps: Sequence[pairs.Pairs], counts: np.ndarray) -> Difference:
    """The difference on resampled patients: percentile interval, and p of its crossing 0.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 15.4; one is added to
        counts, so that p is never 0.
    """
    values = pairs.bootstrap(gaps, counts)
    low, high = intervals.percentile(values) or (float(values.min()), float(values.max()))
    below, above = (1 + (side <= 1e-12).sum() for side in (values, -values))
    p = min(1.0, 2 * min(below, above) / (len(values) + 1))
    return Difference(pairs.auc(gaps), low, high, float(p))


def resampled_t(by_split: Float64[np.ndarray, " split"], folds: int) -> Difference:
    """Student's t over folds whose training sets overlap, with the variance that this hides.

    Args:
        by_split: The difference in each (repeat, fold).
        folds: Of a repeat; the rest of the slides, train and validation, made the head.

    Source:
        Nadeau and Bengio 2003, https://doi.org/10.1023/A:1024068626366, the corrected resampled
        t-test; Bouckaert and Frank 2004, https://doi.org/10.1007/978-3-540-24775-3_3, for repeated
        folds: the variance is (1 / splits + test / train) times that of the differences.
    """
    splits = len(by_split)
    error = np.sqrt((1 / splits + 1 / (folds - 1)) * by_split.var(ddof=1))
    return _difference(float(by_split.mean()), float(error), stats.t(splits - 1))


def _difference(value: float, error: float, distribution: stats.rv_continuous) -> Difference:
    if error < 1e-12:  # no spread: equal predictions tell no difference, others tell no more
        return Difference(value, np.nan, np.nan, 1.0 if abs(value) < 1e-12 else np.nan)
    half = distribution.ppf((1 + intervals.CONFIDENCE) / 2) * error
    p = 2 * distribution.sf(abs(value) / error)
    return Difference(value, float(value - half), float(value + half), float(p))


def mcnemar(one: np.ndarray, other: np.ndarray) -> tuple[float, int, int]:
    """McNemar's exact test on who called which slide right: p, only `one` right, only `other`.

    Slides of one patient count as independent: with several slides a patient p is too small.
    """
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    unlike = only_one + only_other
    p = float(stats.binomtest(only_one, unlike).pvalue) if unlike else 1.0
    return p, only_one, only_other


def _right(folds: Folds) -> np.ndarray:
    """Whether the seed ensemble calls each slide right, in the first repeat: each slide once."""
    first = min(fold.repeat for fold in folds)
    ensembles = [fold.ensemble() for fold in folds if fold.repeat == first]
    return np.concatenate([fold.called()[0] == fold.label for fold in ensembles])


def holm(p: Float64[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """Holm's step-down correction; NaN stays and is no member of the family.

    Source:
        Holm 1979, https://www.jstor.org/stable/4615733.
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected
