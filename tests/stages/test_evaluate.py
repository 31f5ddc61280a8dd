"""Evaluation: figures against independent ones, no way for test labels to leak, nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from stages import evaluate
from stages.common import cohort, fits, sanity, splits, thresholds
from stages.common.bags import StoredBags
from stages.heads import abmil, meanpool
from tests.stages import head_cases
from tests.stages.evaluated import (
    DIM,
    FILES,
    Laboratory,
    contents,
    embedding_of,
    figures,
    predictions,
    rows_of,
)

FLIP = {"well": "ill", "ill": "well"}


def poisoned(rows: list[cohort.SlideRow]) -> list[cohort.SlideRow]:
    return [
        replace(row, label=FLIP[row.label] if row.split == "test" else row.label) for row in rows
    ]


def planned(lab: Laboratory, head: str = "abmil") -> list[fits.Fit]:
    table = evaluate.labelled(splits.read(), lab.classes)
    return evaluate.plan_of(table, lab.bags, head, len(lab.classes), Path("params.yaml"))


def test_every_figure_can_be_recomputed_from_the_predictions(lab: Laboratory) -> None:
    out = lab.run("abmil")
    assert {path.name for path in out.iterdir()} == FILES
    found, table = figures(out), predictions(out)
    runs = []
    for seed in (40, 41):
        mine = table[table.seed == seed]
        val, test = (mine[mine.split == part] for part in ("val", "test"))
        threshold = thresholds.balanced(val.label.to_numpy(), val.probability_1.to_numpy())
        assert (mine.threshold == threshold).all()
        called = test.probability_1 >= threshold
        runs.append(
            {
                "auc": sklearn_metrics.roc_auc_score(test.label, test.probability_1),
                "ap": sklearn_metrics.average_precision_score(test.label, test.probability_1),
                "accuracy": sklearn_metrics.accuracy_score(test.label, called),
                "recall": sklearn_metrics.recall_score(test.label, called),
                "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(test.label, called),
                "majority_accuracy": 5 / 9,
            }
        )
    for name in runs[0]:
        assert found[name] == pytest.approx(np.mean([one[name] for one in runs])), name
    spread = np.std([one["auc"] for one in runs], ddof=1)
    assert found["auc_seed_sd"] == pytest.approx(spread)
    assert (found["slides_test"], found["seeds"], found["splits"]) == (9, 2, 1)


def test_the_tables_say_what_they_promise(lab: Laboratory) -> None:
    out = lab.run("abmil")
    table = predictions(out)
    assert len(table) == 2 * len(lab.rows)
    truth = {row.slide_id: row for row in lab.rows}
    for row in table.itertuples():
        slide = truth[row.slide_id]
        assert (row.patient, row.split, row.label) == (
            slide.patient,
            slide.split,
            int(slide.label == "ill"),
        )
    attention = pd.read_parquet(out / "attention.parquet")
    tests = [row for row in lab.rows if row.split == "test"]
    assert attention.slide_id.unique().tolist() == [row.slide_id for row in tests]
    for row in tests:
        mine = attention[attention.slide_id == row.slide_id]
        assert mine.patch.tolist() == list(range(len(embedding_of(row))))
        assert mine.attention.sum() == pytest.approx(1, abs=1e-5)
    curve = pd.read_csv(out / "roc.csv")
    assert np.isfinite(curve[["fpr", "tpr", "threshold"]]).all(axis=None)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(figures(out)["auc"])
    confusion = pd.read_csv(out / "confusion.csv")
    assert len(confusion) == 9 and set(confusion.actual) == {"well", "ill"}


def test_poisoned_test_labels_change_the_final_figures_only(lab: Laboratory, caplog) -> None:
    out = lab.run("abmil")
    honest, before, looked = figures(out), predictions(out), contents(out)["attention.parquet"]
    lab.rows = poisoned(lab.rows)
    lab.split()
    lab.run("abmil")
    assert "evaluate: 0 fits to make, 2 reused" in caplog.text
    after = predictions(out)
    pd.testing.assert_frame_equal(before.drop(columns="label"), after.drop(columns="label"))
    assert (before.label != after.label).equals(before.split == "test")
    assert contents(out)["attention.parquet"] == looked
    assert figures(out)["auc"] == pytest.approx(1 - honest["auc"])


def test_what_a_fit_is_given_does_not_depend_on_test_labels(lab: Laboratory) -> None:
    honest = planned(lab)
    lab.rows = poisoned(lab.rows)
    lab.split()
    assert planned(lab) == honest
    assert all(set(fit.labels) == {"train", "val"} for fit in honest)
    lab.rows = [replace(row, label=FLIP[row.label]) for row in lab.rows]
    lab.split()
    assert planned(lab) != honest  # what trains and validates does count


def test_crossval_tests_every_slide_once_a_repeat(lab: Laboratory, caplog) -> None:
    lab.split(splits.crossval(lab.rows, 2, 3, 0.3, seed=1), "crossval")
    out = lab.run()
    assert "evaluate: 12 fits to make, 0 reused" in caplog.text
    assert {path.name for path in out.iterdir()} == FILES
    tests = predictions(out).query("split == 'test'")
    assert (tests.groupby(["repeat", "seed", "slide_id"]).size() == 1).all()
    assert len(tests) == 2 * 2 * len(lab.rows)
    found = figures(out)
    assert (found["splits"], found["slides_test"]) == (6, len(lab.rows))
    assert found["auc_split_sd"] >= 0 and found["auc_seed_sd"] == 0  # meanpool draws nothing


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(lab: Laboratory, caplog) -> None:
    lab.settings(seeds=12)
    whole = contents(lab.run("abmil"))
    shutil.rmtree("cache")
    shutil.rmtree(lab.data / "evaluate")
    command = [sys.executable, "-m", "stages.evaluate", "enc", "abmil"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    running = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not made_fits() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 0 < (kept := len(made_fits())) < 12
    assert not (lab.data / "evaluate").exists()
    caplog.clear()
    assert contents(lab.run("abmil")) == whole
    assert f"evaluate: {12 - kept} fits to make, {kept} reused" in caplog.text


def made_fits() -> list[Path]:
    return [path for path in Path("cache").glob("evaluate/*/*") if path.suffix != ".tmp"]


def test_another_bag_or_setting_makes_the_fits_anew(lab: Laboratory, caplog) -> None:
    lab.run()
    lab.rewrite_bag("val-2", np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32))
    lab.run()
    assert caplog.text.count("evaluate: 2 fits to make, 0 reused") == 2


def test_optimistic_figures_come_from_test_slides_and_say_so(lab: Laboratory) -> None:
    lab.split(protocol=splits.OPTIMISTIC)
    lab.settings(sanity=True)
    out = lab.run("abmil")
    found, table = figures(out), predictions(out)
    assert all(name.startswith("optimistic_") for name in found)
    val, test = (set(table[table.split == part].slide_id) for part in ("val", "test"))
    assert set(table.protocol) == set(pd.read_csv(out / "pr.csv").protocol) == {splits.OPTIMISTIC}
    assert val == test and len(table) == 2 * (21 + 9 + 9)
    # the threshold is the best of the very slides that it is scored on
    best, fixed = (found[f"optimistic_{name}accuracy"] for name in ("", "fixed_"))
    assert best >= fixed
    permuted = sanity.fits_of(planned(lab), 2, splits.OPTIMISTIC)[sanity.PERMUTED][0]
    assert permuted.labels["val"] == planned(lab)[0].labels["val"]


def test_sanity_rows_have_nothing_to_learn_from(lab: Laboratory) -> None:
    plan = planned(lab)
    checks = sanity.fits_of(plan, 2, "holdout")
    for honest, permuted in zip(plan, checks[sanity.PERMUTED], strict=True):
        assert permuted.labels != honest.labels
        for part, labels in permuted.labels.items():
            truth, told = np.array(honest.labels[part]), np.array(labels)
            for label in (0, 1):  # of each class half, as in the whole part
                assert abs(told[truth == label].mean() - truth.mean()) <= 1 / (truth == label).sum()
    noise = fits._bags(checks[sanity.RANDOM][0], "test")
    stored = StoredBags(lab.bags, plan[0].slide_ids["test"])
    assert [bag.shape for bag in noise] == [bag.shape for bag in stored]
    assert np.array_equal(noise[3], noise[3]) and not np.array_equal(noise[3], stored[3])
    correlation = np.corrcoef(np.concatenate(list(noise)).ravel(), np.concatenate(stored).ravel())
    assert abs(correlation[0, 1]) < 0.3
    lab.settings(sanity=True)
    found = figures(lab.run())
    for name in (sanity.PERMUTED, sanity.RANDOM):
        assert 0 <= found[name] <= 1 and found[f"{name}_seed_sd"] >= 0


def test_permuted_labels_agree_with_the_truth_no_more_than_even_chance() -> None:
    truth = np.arange(60) % 2
    rng = np.random.default_rng(0)
    agree = [(sanity.permuted(truth, rng) == truth).mean() for _ in range(50)]
    assert set(agree) == {0.5}
    odd = np.array([0, 0, 0, 1, 2, 2, 2])
    told = [sanity.permuted(odd, rng) for _ in range(200)]
    assert all(set(one) == {0, 1, 2} for one in told)
    assert len({tuple(one) for one in told}) > 50


def test_optimistic_fits_keep_the_most_accurate_epoch_and_threshold() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    chance = np.array([0.1, 0.2, 0.6, 0.65, 0.7, 0.55, 0.56, 0.9])
    both = np.stack([1 - chance, chance], 1)
    # 0.5: 2 of 5 and 3 of 3 right, 0.8: 5 of 5 and 1 of 3
    assert fits._chosen(labels, both, False)["threshold"] == 0.5
    assert fits._chosen(labels, both, True)["threshold"] == pytest.approx(0.8)
    section = abmil.Params("plain", 3, 2, head_cases.training(2, 1e-3))
    assert section.training.select == "loss"
    assert fits._by_accuracy(section).training.select == "accuracy"
    assert fits._by_accuracy(meanpool.Params((1.0,))) == meanpool.Params((1.0,))


def test_three_classes_are_scored_against_the_rest(lab: Laboratory) -> None:
    labels = ("well", "ill", "unclear")
    shutil.rmtree(lab.bags)
    lab.rows, lab.classes = rows_of({"train": 15, "val": 9, "test": 9}, labels), sorted(labels)
    lab.write_bags()
    lab.split()
    out = lab.run("abmil")
    table, found = predictions(out), figures(out)
    chances = table[[f"probability_{at}" for at in range(3)]]
    assert "threshold" not in table and np.allclose(chances.sum(axis=1), 1)
    assert "specificity_macro" in found and "recall" not in found
    tests = table[(table.split == "test") & (table.seed == 40)]
    rest = sklearn_metrics.roc_auc_score(
        tests.label, tests[chances.columns], multi_class="ovr", average="macro"
    )
    other = table[(table.split == "test") & (table.seed == 41)]
    rest += sklearn_metrics.roc_auc_score(
        other.label, other[chances.columns], multi_class="ovr", average="macro"
    )
    assert found["auc"] == pytest.approx(rest / 2)


def test_one_seed_leaves_its_spread_out(lab: Laboratory) -> None:
    lab.settings(seeds=1)
    assert "auc_seed_sd" not in figures(lab.run())
    with pytest.raises(ValueError, match=r"evaluate.seeds is 0: it must be 1 or more"):
        evaluate.EvaluateParams(("abmil",), 0, False)


def test_heads_of_two_scales_read_patch_and_crop(lab: Laboratory) -> None:
    with pytest.raises(ValueError, match=r"slide test-0 has no .* set embed.central_crop to true"):
        lab.run("less")
    shutil.rmtree(lab.bags)
    lab.write_bags(crop=True)
    assert 0 <= figures(lab.run("less"))["auc"] <= 1
    bag = StoredBags(lab.bags, ["val-1"], 2)[0]
    one = StoredBags(lab.bags, ["val-1"])[0]
    assert np.array_equal(bag, np.concatenate([one, one[::-1]], axis=1))
