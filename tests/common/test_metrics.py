"""Figures of a cell against scikit-learn's and hand-worked ones; areas of curves are figures."""

import time

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from stages.common import intervals, merits, metrics, scores, thresholds
from tests.common.predicted import predictions

NAMES = ("well", "ill", "unclear")


def runs_of(table: pd.DataFrame) -> list[pd.DataFrame]:
    tests = table[table.split == "test"]
    return [rows for _, rows in tests.groupby(["repeat", "fold", "seed"])]


def mean(runs: list[pd.DataFrame], figure) -> float:
    return float(np.mean([figure(rows) for rows in runs]))


def called(rows: pd.DataFrame) -> np.ndarray:
    return (rows.probability_1 >= rows.threshold).to_numpy(np.int64)


def test_figures_are_means_of_scikit_learns_over_runs() -> None:
    table = predictions(80, 2, 3, 3, noise=2.0)
    runs, found = runs_of(table), metrics.cell(table, NAMES[:2])
    expected = {
        "auc": lambda rows: sklearn_metrics.roc_auc_score(rows.label, rows.probability_1),
        "ap": lambda rows: sklearn_metrics.average_precision_score(rows.label, rows.probability_1),
        "accuracy": lambda rows: sklearn_metrics.accuracy_score(rows.label, called(rows)),
        "balanced_accuracy": lambda rows: sklearn_metrics.balanced_accuracy_score(
            rows.label, called(rows)
        ),
        "majority_accuracy": lambda rows: rows.label.value_counts().max() / len(rows),
        "recall": lambda rows: sklearn_metrics.recall_score(rows.label, called(rows)),
        "recall_macro": lambda rows: sklearn_metrics.recall_score(
            rows.label, called(rows), average="macro"
        ),
        "specificity": lambda rows: sklearn_metrics.recall_score(
            rows.label, called(rows), pos_label=0
        ),
        "fixed_accuracy": lambda rows: ((rows.probability_1 >= 0.5) == rows.label).mean(),
        "brier": lambda rows: sklearn_metrics.brier_score_loss(rows.label, rows.probability_1),
        "temperature": lambda rows: rows.temperature.mean(),
        "threshold": lambda rows: rows.threshold.mean(),
    }
    for name, figure in expected.items():
        assert found[name] == pytest.approx(mean(runs, figure), abs=1e-12), name
    assert len({round(found[name], 6) for name in expected}) > 9  # no two are one by chance


def test_more_classes_are_judged_against_the_rest() -> None:
    table = predictions(90, 1, 3, 2, classes=3)
    runs, found = runs_of(table), metrics.cell(table, NAMES)
    columns = [f"probability_{at}" for at in range(3)]

    def auc(rows: pd.DataFrame) -> float:
        return sklearn_metrics.roc_auc_score(rows.label, rows[columns], multi_class="ovr")

    def recall(rows: pd.DataFrame) -> float:
        guess = rows[columns].to_numpy().argmax(1)
        return sklearn_metrics.recall_score(rows.label, guess, average="macro")

    assert found["auc"] == pytest.approx(mean(runs, auc), abs=1e-12)
    assert found["recall_macro"] == pytest.approx(mean(runs, recall), abs=1e-12)
    assert not {"recall", "specificity", "threshold", "prevalence"} & set(found)


def test_the_seed_ensemble_is_the_mean_probability_at_the_mean_threshold() -> None:
    table = predictions(80, 2, 4, 3, noise=2.0)
    found = metrics.cell(table, NAMES[:2])
    tests = table[table.split == "test"]
    keys = ["repeat", "fold", "slide_id", "label"]
    joined = tests.groupby(keys, as_index=False)[["probability_1", "threshold"]].mean()
    folds = [rows for _, rows in joined.groupby(["repeat", "fold"])]
    auc = mean(folds, lambda rows: sklearn_metrics.roc_auc_score(rows.label, rows.probability_1))
    assert found["ensemble_auc"] == pytest.approx(auc, abs=1e-12)
    counts = sklearn_metrics.confusion_matrix(joined.label, called(joined)) / 2  # two repeats
    cells = [found[f"ensemble_actual_{i}_called_{j}"] for i in (0, 1) for j in (0, 1)]
    assert cells == counts.reshape(-1).tolist() and sum(cells) == 80
    assert found["ensemble_recall"] == pytest.approx(counts[1, 1] / counts[1].sum())
    assert found["ensemble_auc"] > found["auc"]


def test_shares_are_hand_worked() -> None:
    found = merits.shares(np.array([[6, 2], [1, 3]]))
    assert found == {
        "accuracy": 0.75,
        "majority_accuracy": pytest.approx(8 / 12),
        "balanced_accuracy": 0.75,
        "recall_macro": 0.75,
        "recall": 0.75,
        "specificity": 0.75,
    }
    assert merits.shares(np.array([[8, 0], [3, 1]]))["balanced_accuracy"] == 0.625


def test_seeds_and_splits_are_told_apart() -> None:
    generator = np.random.default_rng(1)
    values = 3 * generator.normal(size=(4000, 1)) + 2 * generator.normal(size=(4000, 3))
    found = merits.components(values)
    assert found["seed_sd"] == pytest.approx(2, rel=0.03)
    assert found["split_sd"] == pytest.approx(3, rel=0.03)


def test_components_by_hand() -> None:
    found = merits.components(np.array([[1.0, 3.0], [5.0, 7.0]]))
    assert found == pytest.approx({"seed_sd": np.sqrt(2), "split_sd": np.sqrt(8 - 1)})
    assert merits.components(np.array([[1.0, 3.0]])) == pytest.approx({"seed_sd": np.sqrt(2)})
    assert merits.components(np.array([[1.0], [3.0]])) == pytest.approx({"split_sd": np.sqrt(2)})
    assert merits.components(np.array([[1.0, 3.0], [3.0, 1.0]]))["split_sd"] == 0


def test_one_seed_and_one_split_leave_their_spreads_out() -> None:
    found = metrics.cell(predictions(seeds=1), NAMES[:2])
    assert not [name for name in found if name.endswith("_sd")] and found["seeds"] == 1


def test_all_figures_are_finite_numbers_even_of_a_perfect_head() -> None:
    found = metrics.cell(predictions(signal=40.0), NAMES[:2])
    assert all(np.isfinite(value) for value in found.values())
    assert found["auc"] == 1 and "auc_bootstrap_low" not in found
    assert found["auc_delong_low"] < 0.9 and found["accuracy_wilson_low"] < 0.9


def test_intervals_count_patients_not_slides() -> None:
    wide, narrow = (
        metrics.cell(predictions(160, per_patient=per, noise=3.0), NAMES[:2]) for per in (8, 1)
    )
    assert wide["patients_test"] == 6 and wide["slides_test"] == narrow["slides_test"] == 48
    widths = [one["accuracy_wilson_high"] - one["accuracy_wilson_low"] for one in (wide, narrow)]
    assert widths[0] > 2 * widths[1]


def test_shares_of_a_class_count_its_own_patients() -> None:
    table = predictions(100, noise=2.0)
    ill = (table.split == "test") & (table.label == 1)
    dropped = table.slide_id.isin(table.slide_id[ill].unique()[:9])
    found = metrics.cell(table[~dropped], NAMES[:2])
    for name, patients in (("accuracy", 21), ("recall", 6), ("specificity", 15)):
        ends = [found[f"{name}_wilson_{end}"] for end in ("low", "high")]
        assert ends == pytest.approx(intervals.wilson(found[name], patients))


def test_screening_takes_its_threshold_from_validation() -> None:
    labels = np.array([1] * 20 + [0] * 5)
    chance = np.concatenate([np.linspace(0.2, 0.96, 20), np.full(5, 0.3)])
    assert thresholds.screening(labels, chance) == pytest.approx(0.24)  # 19 of 20
    assert thresholds.screening(labels[1:], chance[1:]) == pytest.approx(0.24)  # 19 of 19
    table = predictions(seeds=1)
    val, test = (table[table.split == part] for part in ("val", "test"))
    at = thresholds.screening(val.label.to_numpy(), val.probability_1.to_numpy())
    found = metrics.cell(table, NAMES[:2])
    of_class = [test.probability_1[test.label == label] for label in (0, 1)]
    assert found["specificity_at_sensitivity_95"] == pytest.approx((of_class[0] < at).mean())
    assert found["recall_at_sensitivity_95"] == pytest.approx((of_class[1] >= at).mean())


def test_rejects_validation_slides_of_class_0_only() -> None:
    table = predictions()
    table.loc[table.split == "val", "label"] = 0
    with pytest.raises(ValueError, match="12 validation slides none is of class 1"):
        metrics.cell(table, NAMES[:2])


def test_the_areas_of_the_curves_are_the_figures() -> None:
    for classes in (2, 3):
        table = predictions(90, 2, 3, 2, classes=classes)
        found, curves = (make(table, NAMES[:classes]) for make in (metrics.cell, metrics.curves))
        roc, pr = curves["roc"], curves["pr"]
        assert np.trapezoid(roc.tpr, roc.fpr) == pytest.approx(found["auc"], abs=1e-9)
        assert np.trapezoid(pr.precision, pr.recall) == pytest.approx(found["ap"], abs=1e-9)
        for curve in curves.values():
            assert np.isfinite(curve.select_dtypes("number").to_numpy()).all()


def test_calibration_and_confusion_tables_hold_every_slide() -> None:
    table = predictions(60, 2, 3, 2)
    curves, found = metrics.curves(table, NAMES[:2]), metrics.cell(table, NAMES[:2])
    bins = curves["calibration"]
    assert bins.groupby("scaling").slides.sum().to_dict() == {"before": 240, "after": 240}
    for scaling, name in (("before", "ece"), ("after", "ece_scaled")):
        of = bins[bins.scaling == scaling]
        gap = ((of.predicted - of.observed).abs() * of.slides).sum() / 240
        assert found[name] == pytest.approx(gap)
    tests = table[table.split == "test"]
    odds = (tests.probability_1 / tests.probability_0) ** (1 / tests.temperature)
    after = bins[bins.scaling == "after"]
    assert np.average(after.predicted, weights=after.slides) == pytest.approx(
        (odds / (1 + odds)).mean()
    )
    confusion = curves["confusion"]
    wrong = (confusion.actual == "ill") & (confusion.predicted == "well")
    assert len(confusion) == 120 and wrong.sum() / 2 == found["ensemble_actual_1_called_0"]


def test_order_of_rows_changes_nothing() -> None:
    table = predictions(60, 1, 3, 2)
    mixed = table.sample(frac=1, random_state=1)
    assert metrics.cell(mixed, NAMES[:2]) == metrics.cell(table, NAMES[:2])


def test_a_cell_of_a_thousand_slides_takes_seconds() -> None:
    table = predictions(1000, 5, 5, 5)
    begin = time.process_time()
    metrics.cell(table, NAMES[:2])
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[table.split != "test"], "no slide of the part test"),
        (lambda table: table.drop(table.index[table.split == "test"][0]), "not the same 18 slides"),
        (lambda table: pd.concat([table, table]), "each once, for all 3 seeds"),
        (lambda table: table.assign(probability_1=np.nan), "slide s0.* has the probabilities"),
        (lambda table: table.assign(probability_1=0.7), "sum to 1"),
        (
            lambda table: table.assign(threshold=np.nan),
            "threshold of repeat 0, fold 0 is .nan, nan",
        ),
        (lambda table: table.assign(temperature=np.inf), "temperature of repeat 0, fold 0 is .inf"),
    ],
)
def test_rejects_predictions_that_are_not_whole(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scores.of_part(change(predictions()), 2)


def test_the_interval_of_the_balanced_accuracy_is_that_of_resampled_patients() -> None:
    table = predictions(60, 1, 1, 2, noise=2.0, per_patient=2)
    found = metrics.cell(table, NAMES[:2], seed=5)
    folds = scores.of_part(table, 2)
    patients = np.unique(folds[0].patient)
    draws = intervals.resamples(folds, patients, 5)[:300]
    values = []
    for draw in draws:
        chosen = np.repeat(patients, draw)
        rows = [np.flatnonzero(folds[0].patient == patient) for patient in chosen]
        at = np.concatenate(rows)
        runs = [
            sklearn_metrics.balanced_accuracy_score(folds[0].label[at], of_seed[at])
            for of_seed in folds[0].called()
        ]
        values.append(np.mean(runs))
    low, high = np.quantile(values, [0.025, 0.975])
    ends = [found[f"balanced_accuracy_bootstrap_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx([low, high], abs=0.03)
    assert ends[0] < found["balanced_accuracy"] < ends[1]


def test_more_classes_are_screened_each_against_the_rest() -> None:
    table = predictions(60, 1, 1, 1, classes=3, noise=2.0)
    found = metrics.cell(table, NAMES)
    val, test = (table[table.split == part] for part in ("val", "test"))
    recalls, specificities, macro = [], [], []
    called = test[[f"probability_{at}" for at in range(3)]].to_numpy().argmax(1)
    for at in range(3):
        own = np.sort(val[val.label == at][f"probability_{at}"].to_numpy())[::-1]
        threshold = own[int(np.ceil(0.95 * len(own))) - 1]
        over = test[f"probability_{at}"] >= threshold
        recalls.append(over[test.label == at].mean())
        specificities.append(1 - over[test.label != at].mean())
        macro.append((called[test.label != at] != at).mean())
    assert found["recall_at_sensitivity_95"] == pytest.approx(np.mean(recalls))
    assert found["specificity_at_sensitivity_95"] == pytest.approx(np.mean(specificities))
    assert found["specificity_macro"] == pytest.approx(np.mean(macro))
