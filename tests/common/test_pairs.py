"""AUC, its variance and interval: against loops over pairs, and by how often they hold."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from stages.common import intervals, pairs, scores
from stages.common.pairs import Pairs
from tests.common.predicted import predictions


def wins(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    gap = positive[:, None] - negative
    return (gap > 0) + 0.5 * (gap == 0)


def of(positive: np.ndarray, negative: np.ndarray) -> Pairs:
    """One slide a patient."""
    numbers = np.arange(len(positive) + len(negative))
    return Pairs(1, wins(positive, negative), numbers[: len(positive)], numbers[len(positive) :])


def delong_by_loops(positive: np.ndarray, negative: np.ndarray) -> float:
    """DeLong's variance as the paper writes it, one pair after the other."""

    def won(x: float, y: float) -> float:
        return 1.0 if x > y else 0.5 if x == y else 0.0

    m, n = len(positive), len(negative)
    theta = sum(won(x, y) for x in positive for y in negative) / (m * n)
    of_positive = [sum(won(x, y) for y in negative) / n for x in positive]
    of_negative = [sum(won(x, y) for x in positive) / m for y in negative]
    first = sum((value - theta) ** 2 for value in of_positive) / (m - 1)
    second = sum((value - theta) ** 2 for value in of_negative) / (n - 1)
    return first / m + second / n


def test_variance_is_delongs() -> None:
    generator = np.random.default_rng(3)
    positive, negative = generator.integers(2, 9, 7) / 4.0, generator.integers(0, 7, 11) / 4.0
    found = pairs.variance([of(positive, negative)])
    assert found == pytest.approx(delong_by_loops(positive, negative), rel=1e-12)


def test_variance_of_a_difference_is_delongs_with_its_covariance() -> None:
    generator = np.random.default_rng(4)
    shared = generator.normal(size=19)
    one, other = shared + generator.normal(size=19), shared + 0.5 * generator.normal(size=19)
    one[:8] += 1
    gap = of(one[:8], one[8:]) - of(other[:8], other[8:])
    covariance = 0.0
    for axis in (1, 0):
        placements = [wins(of_one[:8], of_one[8:]).mean(axis) for of_one in (one, other)]
        s = np.cov(np.array(placements))
        covariance += (s[0, 0] + s[1, 1] - 2 * s[0, 1]) / len(placements[0])
    assert pairs.variance([gap]) == pytest.approx(covariance, rel=1e-12)
    assert pairs.auc([gap]) == pytest.approx(
        roc_auc_score(np.arange(19) < 8, one) - roc_auc_score(np.arange(19) < 8, other)
    )


def test_variance_over_patients_is_obuchowskis() -> None:
    generator = np.random.default_rng(5)
    patient = np.array([0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 7])
    label = np.array([1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0])
    score = generator.normal(size=14) + label
    won = wins(score[label == 1], score[label == 0])
    of_class = [patient[label == at] for at in (0, 1)]
    theta, (m, n) = won.mean(), won.shape
    sums = {"positive": np.zeros(8), "negative": np.zeros(8)}
    for value, who in zip(won.mean(1), of_class[1], strict=True):
        sums["positive"][who] += value - theta
    for value, who in zip(won.mean(0), of_class[0], strict=True):
        sums["negative"][who] += value - theta
    i10, i01 = (len(set(who)) for who in (of_class[1], of_class[0]))
    s10 = i10 / ((i10 - 1) * m) * (sums["positive"] ** 2).sum()
    s01 = i01 / ((i01 - 1) * n) * (sums["negative"] ** 2).sum()
    factor = np.sqrt(i10 / (i10 - 1) * i01 / (i01 - 1))  # where Obuchowski has I / (I - 1)
    s11 = factor * (sums["positive"] * sums["negative"]).sum()
    expected = s10 / m + s01 / n + 2 * s11 / (m * n)
    assert pairs.variance([Pairs(1, won, of_class[1], of_class[0])]) == pytest.approx(expected)


def test_one_patient_of_a_class_has_no_variance() -> None:
    one = Pairs(1, np.array([[1.0, 0.5], [0.0, 1.0]]), np.array([0, 0]), np.array([1, 2]))
    assert pairs.variance([one]) is None and pairs.interval([one]) is None


@pytest.mark.parametrize("classes", [2, 3])
def test_auc_is_the_mean_over_splits_seeds_and_classes(classes: int) -> None:
    folds = scores.of_part(predictions(90, 2, 3, 2, classes), classes)
    expected = [
        roc_auc_score(fold.label == at, probability[:, at])
        for fold in folds
        for probability in fold.probability
        for at in ([1] if classes == 2 else range(3))
    ]
    assert pairs.auc(pairs.pairs_of(folds)) == pytest.approx(np.mean(expected), abs=1e-12)


def test_slides_that_score_alike_share_their_pair() -> None:
    table = predictions(noise=3.0)
    table["probability_1"] = table.probability_1.round(1)
    table["probability_0"] = 1 - table.probability_1
    (fold,) = scores.of_part(table, 2)
    expected = [roc_auc_score(fold.label, of_seed[:, 1]) for of_seed in fold.probability]
    assert pairs.auc(pairs.pairs_of([fold])) == pytest.approx(np.mean(expected), abs=1e-12)


def test_resampled_auc_is_that_of_the_repeated_slides() -> None:
    folds = scores.of_part(predictions(60, 1, 1, 2, per_patient=2, noise=2), 2)
    patients = pairs.patients_of(folds)
    counts = intervals.resamples(folds, patients, 0, 7)
    found = pairs.bootstrap(pairs.pairs_of(folds), counts)
    for count, value in zip(counts, found, strict=True):
        times = count[np.searchsorted(patients, folds[0].patient)]
        expected = [
            roc_auc_score(np.repeat(folds[0].label, times), np.repeat(of_seed[:, 1], times))
            for of_seed in folds[0].probability
        ]
        assert value == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_fold_that_lost_a_class_is_left_out_of_the_resample() -> None:
    first, second = of(np.array([1.0, 2.0]), np.array([0.0, 3.0])), of(*np.array([[5.0], [4.0]]))
    second = Pairs(1, second.wins, np.array([4]), np.array([5]))
    counts = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 2], [2, 0, 0, 0, 0, 1]])
    assert pairs.bootstrap([first, second], counts).tolist() == [0.75, 0.5]


def test_resamples_keep_the_patients_of_each_class() -> None:
    folds = scores.of_part(predictions(70, 2, 5, per_patient=2), 2)
    patients = pairs.patients_of(folds)
    label = np.array([int(name[1:]) % 2 for name in patients])
    counts = intervals.resamples(folds, patients, 3, 50)
    assert (counts[:, label == 1].sum(1) == label.sum()).all()
    assert (counts.sum(1) == len(patients)).all() and counts.std() > 0.8


def test_an_interval_stays_within_0_and_1_and_is_symmetric_on_the_logit_scale() -> None:
    pair = of(np.array([0.3, 0.8, 0.9, 0.95]), np.array([0.1, 0.2, 0.35, 0.4, 0.05]))
    low, high = pairs.interval([pair])
    value = pairs.auc([pair])
    logit = [np.log(at / (1 - at)) for at in (low, value, high)]
    assert 0 < low < value < high < 1
    assert logit[2] - logit[1] == pytest.approx(logit[1] - logit[0])
    half = 1.959964 * np.sqrt(pairs.variance([pair])) / (value * (1 - value))
    assert logit[2] - logit[1] == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(("value", "m", "n"), [(1.0, 7, 11), (0.8, 5, 9), (0.0, 4, 3), (0.5, 2, 2)])
def test_newcombes_interval_holds_the_aucs_within_196_standard_errors(value, m, n) -> None:
    true = np.linspace(1e-6, 1 - 1e-6, 200_001)
    typical = (m + n) / 2 - 1
    q1, q2 = true / (2 - true), 2 * true**2 / (1 + true)  # Hanley and McNeil's, with one N
    error = (true * (1 - true) + typical * (q1 - true**2) + typical * (q2 - true**2)) / (m * n)
    inside = true[np.abs(value - true) <= 1.959964 * np.sqrt(error)]
    low, high = pairs.newcombe(value, m, n)
    assert (low, high) == pytest.approx((inside.min(), inside.max()), abs=2e-5)


def test_a_perfect_auc_has_an_interval_over_the_patients_of_both_classes() -> None:
    folds = scores.of_part(predictions(60, 1, 3, signal=40.0, per_patient=2), 2)
    assert pairs.auc(pairs.pairs_of(folds)) == 1
    assert pairs.interval(pairs.pairs_of(folds)) == pairs.newcombe(1.0, 15, 15)
    assert 0.7 < pairs.newcombe(1.0, 15, 15)[0] < 0.9


def test_of_several_classes_the_rarest_sets_a_perfect_aucs_interval() -> None:
    table = predictions(60, classes=3, signal=60.0)
    rare = (table.label == 2) & table.slide_id.isin([f"s{at:04d}" for at in range(2, 60, 6)])
    folds = scores.of_part(table[~rare], 3)
    patients = [int((folds[0].label == at).sum()) for at in range(3)]
    assert patients[2] < patients[0] == patients[1] == 6
    expected = pairs.newcombe(1.0, patients[2], 12)
    assert pairs.interval(pairs.pairs_of(folds)) == pytest.approx(expected)


def drawn(generator: np.random.Generator, patients: int, slides: int, shift: float) -> Pairs:
    """Patients whose slides look alike (correlation 0.8), half of each class."""
    score = np.sqrt(0.8) * generator.normal(size=(patients, 1))
    score = score + np.sqrt(0.2) * generator.normal(size=(patients, slides))
    score[: patients // 2] += shift
    number = np.repeat(np.arange(patients), slides)
    cut = patients // 2 * slides
    flat = score.reshape(-1)
    return Pairs(1, wins(flat[:cut], flat[cut:]), number[:cut], number[cut:])


@pytest.mark.parametrize(("patients", "slides"), [(60, 1), (44, 5)])
def test_nineteen_of_twenty_intervals_hold_the_true_auc(patients: int, slides: int) -> None:
    generator = np.random.default_rng(11)
    true = stats.norm.cdf(1.5 / np.sqrt(2))
    held = {"delong": 0, "bootstrap": 0}
    rounds = 400
    for _ in range(rounds):
        pair = drawn(generator, patients, slides, 1.5)
        half = patients // 2
        draws = [generator.multinomial(half, np.full(half, 1 / half), 300) for _ in range(2)]
        resampled = pairs.bootstrap([pair], np.hstack(draws))
        for name, ends in (
            ("delong", pairs.interval([pair])),
            ("bootstrap", intervals.percentile(resampled)),
        ):
            held[name] += ends[0] <= true <= ends[1]
    assert 0.92 < held["delong"] / rounds < 0.985
    assert 0.90 < held["bootstrap"] / rounds < 0.985  # percentiles are a little narrow


def test_newcombes_interval_holds_near_1_where_delongs_has_no_width() -> None:
    generator = np.random.default_rng(12)
    shift = 3.5
    true = stats.norm.cdf(shift / np.sqrt(2))
    values = [pairs.auc([drawn(generator, 24, 1, shift)]) for _ in range(600)]
    ends = [pairs.newcombe(value, 12, 12) for value in values]
    held = np.mean([low <= true <= high for low, high in ends])
    assert np.mean(np.array(values) == 1) > 0.3 and held > 0.93


def test_rejects_a_fold_without_a_class() -> None:
    table = predictions()
    table["label"] = 1
    with pytest.raises(ValueError, match="18 are of class 1: the AUC needs slides of this class"):
        pairs.pairs_of(scores.of_part(table, 2))
