"""AUC as the share of pairs won: its variance, interval and test for folds, seeds and patients.

The AUC is the mean over pairs (slide of the class, slide of another class) of 1 where the first
scores higher, 1/2 where both score alike, 0 otherwise (Mann and Whitney). Means over seeds,
differences between encoders, folds, repeats and classes are linear in this table of wins, so one
function gives the variance of each of them, and one resamples the patients of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import brentq
from scipy.special import expit, logit

from stages.common.intervals import QUANTILE
from stages.common.scores import Scores


@dataclass(frozen=True)
class Pairs:
    """Wins of one class against the others in one fold."""

    label: int  # the class
    wins: Float64[np.ndarray, "positive negative"]  # 1, 1/2 or 0, averaged over seeds
    positive: Int64[np.ndarray, " positive"]  # number of each slide's patient
    negative: Int64[np.ndarray, " negative"]

    def __sub__(self, other: "Pairs") -> "Pairs":
        """The pairs of a difference of two AUCs on the same slides."""
        return Pairs(self.label, self.wins - other.wins, self.positive, self.negative)


def patients_of(folds: Sequence[Scores]) -> np.ndarray:
    """The patients of all folds, sorted: `Pairs` numbers them in this order."""
    return np.unique(np.concatenate([fold.patient for fold in folds]))


def pairs_of(folds: Sequence[Scores]) -> list[Pairs]:
    """For two classes the pairs of class 1 in each fold, for more those of each class in each.

    Raises:
        ValueError: a fold has no slide of a class, or slides of one class only.
    """
    patients = patients_of(folds)
    classes = folds[0].probability.shape[2]
    wanted = [1] if classes == 2 else range(classes)
    numbers = [np.searchsorted(patients, fold.patient) for fold in folds]
    return [
        _pairs(fold, at, number)
        for fold, number in zip(folds, numbers, strict=True)
        for at in wanted
    ]


def _pairs(fold: Scores, at: int, patient: Int64[np.ndarray, " slide"]) -> Pairs:
    chosen = fold.label == at
    if chosen.all() or not chosen.any():
        raise ValueError(
            f"of {len(chosen)} test slides of repeat {fold.repeat}, fold {fold.fold}, "
            f"{chosen.sum()} are of class {at}: the AUC needs slides of this class and of another; "
            "use fewer folds or add slides, and rerun `dvc repro split`"
        )
    score = fold.probability[..., at]
    wins = np.zeros((chosen.sum(), (~chosen).sum()))
    for of_seed in score:
        gap = of_seed[chosen][:, None] - of_seed[~chosen]
        wins += (np.sign(gap) + 1) / 2
    return Pairs(at, wins / len(score), patient[chosen], patient[~chosen])


def auc(pairs: Sequence[Pairs]) -> float:
    """The mean of the AUCs, or of their differences."""
    return float(np.mean([pair.wins.mean() for pair in pairs]))


def variance(pairs: Sequence[Pairs]) -> float | None:
    """The variance of `auc(pairs)` over patients, given the trained heads.

    None where a class has slides of one patient only in a fold: nothing says how patients differ.

    Source:
        DeLong et al. 1988, https://doi.org/10.2307/2531595, for one fold and a slide a patient;
        Obuchowski 1997, https://doi.org/10.2307/2533958, for several slides a patient. Differs in
        the covariance between the two classes' slides of a patient, whose factor I / (I - 1) is
        taken from the patients of the two classes and not from all, and in that a patient's parts
        are summed over folds, repeats and classes before squaring.
    """
    parts = np.zeros(1 + max(max(pair.positive.max(), pair.negative.max()) for pair in pairs))
    for pair in pairs:
        mean = pair.wins.mean()
        for axis, patient in ((1, pair.positive), (0, pair.negative)):
            groups = len(np.unique(patient))
            if groups < 2:
                return None
            placement = (pair.wins.mean(axis) - mean) / len(patient)
            parts += np.bincount(
                patient, placement * np.sqrt(groups / (groups - 1)), minlength=len(parts)
            )
    return float(((parts / len(pairs)) ** 2).sum())


def interval(pairs: Sequence[Pairs]) -> tuple[float, float] | None:
    """The 95 % confidence interval of an AUC; None where `variance` is.

    Symmetric on the logit scale, so that it stays within 0 and 1. Where all pairs fall alike (an
    AUC of 1) the variance is 0 and says nothing: there Newcombe's interval is taken, over patients.

    Source:
        Pepe 2003, The Statistical Evaluation of Medical Tests, section 5.2.4, for the logit.
    """
    found = variance(pairs)
    if found is None:
        return None
    value = auc(pairs)
    if found < 1e-12 or not 0 < value < 1:
        return newcombe(value, *min(_patients_of_classes(pairs)))
    half = QUANTILE * np.sqrt(found) / (value * (1 - value))
    low, high = expit(logit(value) + np.array([-half, half]))
    return float(low), float(high)


def _patients_of_classes(pairs: Sequence[Pairs]) -> list[tuple[int, int]]:
    """For each class, how many patients have slides of it and how many have others."""
    return [
        tuple(
            len(
                np.unique(
                    np.concatenate([getattr(pair, side) for pair in pairs if pair.label == at])
                )
            )
            for side in ("positive", "negative")
        )
        for at in {pair.label for pair in pairs}
    ]


def newcombe(value: float, positive: int, negative: int) -> tuple[float, float]:
    """The 95 % confidence interval of an AUC from itself and the counts of both classes.

    The interval holds each true AUC from which `value` is at most 1.96 standard errors away, with
    the standard error at that AUC: at a value of 1 it has a width, as Wilson's has for a share.

    Source:
        Newcombe 2006, https://doi.org/10.1002/sim.2324, method 5.
    """
    typical = (positive + negative) / 2 - 1

    def excess(true: float) -> float:
        spread = 1 + typical * ((1 - true) / (2 - true) + true / (1 + true))
        return (value - true) ** 2 - QUANTILE**2 * true * (1 - true) * spread / (
            positive * negative
        )

    # Just inside of 0 and 1, where the standard error is 0 and any value is its own bound.
    low = 0.0 if value <= 0 else brentq(excess, 0, value * (1 - 1e-12))
    high = 1.0 if value >= 1 else brentq(excess, max(value, 1e-12), 1)
    return float(low), float(high)


def bootstrap(
    pairs: Sequence[Pairs], counts: Int64[np.ndarray, "resample patient"]
) -> Float64[np.ndarray, " defined"]:
    """`auc(pairs)` of resampled patients; folds that lost a class are left out of a resample.

    Args:
        pairs: As from `pairs_of`, or differences of these.
        counts: How often each patient is drawn, from `stages.common.intervals.resamples`.

    Returns:
        One value for each resample that left a fold with both classes.
    """
    total, defined = np.zeros(len(counts)), np.zeros(len(counts))
    for pair in pairs:
        positive, negative = (
            counts[:, drawn].astype(np.float64) for drawn in (pair.positive, pair.negative)
        )
        won = ((positive @ pair.wins) * negative).sum(1)
        played = positive.sum(1) * negative.sum(1)
        total += np.divide(won, played, out=np.zeros_like(won), where=played > 0)
        defined += played > 0
    return total[defined > 0] / defined[defined > 0]
