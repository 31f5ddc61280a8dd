"""Figures of merit of one encoder and head: what evaluate writes into metrics.json.

A run is one seed on one split, a (repeat, fold). Figures are means over runs on test slides; those
that start with `ensemble_` are of the mean probability over the seeds of a split, called at the
mean of their thresholds. With two classes class 1, the last, is the positive one; with more, areas
are the mean of each class against the rest.

    slides_test, patients_test, splits, seeds   counts; slides and patients over all folds
    prevalence                   share of class 1 (two classes)
    auc, ap                      areas under the ROC and the precision-recall curve
    auc_delong_low, _high        95 % interval over patients, given the trained heads: DeLong's on
                                 the logit scale; Newcombe's where all pairs fall alike (AUC 1)
    auc_bootstrap_low, _high     the same by 2,000 stratified resamples of patients
    accuracy, balanced_accuracy  at the threshold that evaluation chose on validation slides
    majority_accuracy            share of the largest class: what a constant answer reaches at best
    recall, specificity          of class 1 and of class 0 (two classes)
    recall_macro                 mean of the classes' recalls, which is the balanced accuracy
    specificity_macro            mean of the classes' specificities against the rest (more classes)
    fixed_*                      accuracy, balanced_accuracy, recall, specificity called at 0.5
    specificity_at_sensitivity_95, recall_at_sensitivity_95
                                 at the highest threshold that calls 95 % of the class-1 slides of
                                 validation; the recall says what became of the 95 % on test. Of
                                 more classes the mean of each against the rest
    brier, brier_scaled          mean squared error of the probabilities, halved: (p - y)^2, before
                                 and after the temperature
    ece, ece_scaled              expected calibration error over the slides of all runs, before and
                                 after the temperature that validation chose
    temperature, threshold       their means
    ensemble_actual_1_called_0   confusion counts, each slide once; with repeats their mean
    *_seed_sd, *_split_sd        spread that seeds make, and that splits make without the seeds'
    *_wilson_low, _high          95 % interval of a share, counting patients, not slides
    balanced_accuracy_bootstrap_low, _high
                                 of the resampled patients, given the calls

Left out, as there is no number: *_seed_sd with one seed, *_split_sd with one split, DeLong's
interval where a fold has one patient of a class, the bootstrap's where all resamples are alike
(an AUC of 1); for more than two classes everything that needs a positive class or a threshold.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stages.common import calibration, intervals, merits, pairs, scores, thresholds
from stages.common import curves as tables
from stages.common.scores import Scores

SPREAD = ("auc", "ap", "accuracy", "balanced_accuracy", "recall", "specificity")
FIXED = ("accuracy", "balanced_accuracy", "recall", "specificity")


def cell(predictions: pd.DataFrame, classes: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Every figure named above, as finite numbers.

    Args:
        predictions: Of one encoder and head, see `stages.common.scores.of_part`; validation and
            test slides, others are ignored.
        classes: Names in the order of the labels' indices.
        seed: Of the resamples.

    Raises:
        ValueError: a fold's test slides lack a class, or predictions are not whole.
    """
    tests = scores.of_part(predictions, len(classes))
    vals = scores.of_part(predictions, len(classes), "val")
    ensembles = [fold.ensemble() for fold in tests]
    draws = intervals.resamples(tests, pairs.patients_of(tests), seed)
    runs = [_runs(test, val) for test, val in zip(tests, vals, strict=True)]
    means = merits.mean_of([run for split in runs for run in split])
    return {
        **_counts(tests),
        **_area("auc", tests, draws),
        **_balanced(tests, draws),
        **means,
        **_wilson(means, tests),
        **_spreads(runs),
        **_calibration(tests),
        **_area("ensemble_auc", ensembles, draws),
        **_of_ensembles(ensembles),
    }


def curves(predictions: pd.DataFrame, classes: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The tables of DVC's plots: roc, pr, calibration and confusion, see `stages.common.curves`."""
    tests = scores.of_part(predictions, len(classes))
    return {
        "roc": tables.roc(tests),
        "pr": tables.pr(tests),
        "calibration": tables.calibrated(tests),
        "confusion": tables.confusion(tests, classes),
    }


def _counts(tests: list[Scores]) -> dict[str, float]:
    patients = pairs.patients_of(tests)
    slides = {
        slide: at for fold in tests for slide, at in zip(fold.slide_id, fold.label, strict=True)
    }
    counts = {
        "slides_test": len(slides),
        "patients_test": len(patients),
        "splits": len(tests),
        "seeds": len(tests[0].probability),
    }
    if tests[0].threshold is not None:
        counts["prevalence"] = float(np.mean(list(slides.values())))
    return counts


def _runs(test: Scores, val: Scores) -> list[dict[str, float]]:
    """The figures of a split, a dict for each seed."""
    classes = test.probability.shape[2]
    runs = []
    for at, (probability, called) in enumerate(zip(test.probability, test.called(), strict=True)):
        figures = {
            **merits.areas(test.label, probability),
            **merits.shares(merits.counts_of(test.label, called, classes)),
            "brier": merits.brier(test.label, probability),
            "brier_scaled": merits.brier(
                test.label, calibration.scaled(probability, test.temperature[at])
            ),
            "temperature": float(test.temperature[at]),
        }
        figures |= _screened(test, val, at)
        if test.threshold is not None:
            figures["threshold"] = float(test.threshold[at])
            fixed = merits.shares(merits.counts_of(test.label, probability[:, 1] >= 0.5, 2))
            figures |= {f"fixed_{name}": fixed[name] for name in FIXED}
        runs.append(figures)
    return runs


def _screened(test: Scores, val: Scores, at: int) -> dict[str, float]:
    """What seed `at` would reach at the thresholds of screening, a class against the rest."""
    classes = test.probability.shape[2]
    found = []
    for label in [1] if classes == 2 else range(classes):
        own = (val.label == label).astype(np.int64)
        threshold = thresholds.screening(own, val.probability[at, :, label])
        called = test.probability[at, :, label] >= threshold
        found.append(merits.shares(merits.counts_of(test.label == label, called, 2)))
    means = merits.mean_of(found)
    return {f"{name}_at_sensitivity_95": means[name] for name in ("specificity", "recall")}


def _area(name: str, folds: list[Scores], draws: np.ndarray) -> dict[str, float]:
    """The AUC `name`, which is the mean over runs, with its intervals."""
    areas = pairs.pairs_of(folds)
    found = {"delong": pairs.interval(areas)}
    found["bootstrap"] = intervals.percentile(pairs.bootstrap(areas, draws))
    return {name: pairs.auc(areas), **_ends(name, found)}


def _balanced(folds: list[Scores], draws: np.ndarray) -> dict[str, float]:
    """The interval of the balanced accuracy over resampled patients, given the calls."""
    patients = pairs.patients_of(folds)
    total, defined = np.zeros(len(draws)), np.zeros(len(draws))
    for fold in folds:
        drawn = draws[:, np.searchsorted(patients, fold.patient)]
        right = (fold.called() == fold.label).mean(0)  # share of the seeds
        classes = [fold.label == at for at in range(fold.probability.shape[2])]
        there = np.all([drawn[:, own].sum(1) > 0 for own in classes], axis=0)
        recalls = [
            (drawn[there][:, own] @ right[own]) / drawn[there][:, own].sum(1) for own in classes
        ]
        total[there] += np.mean(recalls, axis=0)
        defined += there
    values = total[defined > 0] / defined[defined > 0]
    return _ends("balanced_accuracy", {"bootstrap": intervals.percentile(values)})


def _ends(name: str, found: dict[str, tuple[float, float] | None]) -> dict[str, float]:
    return {
        f"{name}_{method}_{end}": value
        for method, ends in found.items()
        if ends is not None
        for end, value in zip(("low", "high"), ends, strict=True)
    }


def _spreads(runs: list[list[dict[str, float]]]) -> dict[str, float]:
    return {
        f"{name}_{source}": value
        for name in SPREAD
        if name in runs[0][0]
        for source, value in merits.components(
            np.array([[run[name] for run in split] for split in runs])
        ).items()
    }


def _calibration(tests: list[Scores]) -> dict[str, float]:
    before, after, labels = tables.pooled(tests)
    return {
        name: calibration.expected_error(calibration.reliability(probability, labels))
        for name, probability in (("ece", before), ("ece_scaled", after))
    }


def _of_ensembles(folds: list[Scores]) -> dict[str, float]:
    """Figures of the seed ensembles, from each slide once; the mean where repeats have it again."""
    classes = folds[0].probability.shape[2]
    repeats = len({fold.repeat for fold in folds})
    counts = (
        sum(merits.counts_of(fold.label, fold.called()[0], classes) for fold in folds) / repeats
    )
    figures = {name: value for name, value in merits.shares(counts).items() if name in SPREAD}
    ap = [merits.areas(fold.label, fold.probability[0])["ap"] for fold in folds]
    figures |= {"ap": float(np.mean(ap))}
    figures |= {"brier": float(np.mean([merits.brier(f.label, f.probability[0]) for f in folds]))}
    figures |= _wilson(figures, folds)
    figures |= {
        f"actual_{actual}_called_{called}": float(counts[actual, called])
        for actual in range(classes)
        for called in range(classes)
    }
    return {f"ensemble_{name}": value for name, value in figures.items()}


def _wilson(figures: dict[str, float], folds: list[Scores]) -> dict[str, float]:
    """Intervals of the shares; slides of one patient are no independent trials, patients are."""
    of_class = [
        len({patient for fold in folds for patient in fold.patient[fold.label == at]})
        for at in range(folds[0].probability.shape[2])
    ]
    trials = {"accuracy": len(pairs.patients_of(folds))}
    if len(of_class) == 2:
        trials |= {"specificity": of_class[0], "recall": of_class[1]}
    ends = {name: intervals.wilson(figures[name], count) for name, count in trials.items()}
    return {
        key: value for name in ends for key, value in _ends(name, {"wilson": ends[name]}).items()
    }
