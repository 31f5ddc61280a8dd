"""Evaluation: figures against hand-worked ones, no way for test labels to leak, bad input."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from stages import evaluate
from stages.common import bags as labelled
from stages.common import cohort, metrics, stores
from stages.common.cohort import SlideRow
from stages.heads import abmil, meanpool
from tests.stages import head_cases

DIM = 5
FILES = ("metrics.json", "predictions.csv", "roc.csv", "attention.csv")
TRAINING = head_cases.training(7, 5e-3)
HEADS = {
    "abmil": partial(abmil.build, params=abmil.Params("gated", 11, 7, TRAINING)),
    "meanpool": partial(meanpool.build, params=meanpool.Params((0.1, 1.0))),
}


def rows_of(counts: dict[str, int]) -> list[SlideRow]:
    """Slides of both classes in turn, one patient each."""
    names = [(split, at) for split, count in counts.items() for at in range(count)]
    return [
        SlideRow(f"{split}-{at}", "", ("well", "ill")[at % 2], f"p-{split}-{at}", split, "0.5", "")
        for split, at in names
    ]


ROWS = rows_of({"train": 14, "val": 7, "test": 9})


def write_cohort(folder: Path, rows: list[SlideRow], classes: tuple[str, ...] = ("well", "ill")):
    folder.mkdir(exist_ok=True)
    cohort.write_rows(folder, rows, list(classes))


def write_bag(folder: Path, slide_id: str, embedding: np.ndarray) -> None:
    (folder / slide_id).mkdir(parents=True)
    attributes = {"slide_id": slide_id, "mpp": 0.5, "slide_mpp": 0.5, "input": "x"}
    origin = np.zeros((len(embedding), 2), np.int64)
    stores.create_bag(folder / slide_id / "bag.zarr", embedding, origin, attributes)


def embedding_of(row: SlideRow) -> np.ndarray:
    rng = np.random.default_rng(list(row.slide_id.encode()))
    embedding = rng.normal(size=(rng.integers(2, 7), DIM))
    return (embedding + (row.label == "ill")).astype(np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A cohort of 30 slides and the bags of one encoder."""
    write_cohort(tmp_path / "cohort", ROWS)
    for row in ROWS:
        write_bag(tmp_path / "bags", row.slide_id, embedding_of(row))
    return tmp_path


def run(data: Path, head: str = "abmil", target: str = "out", seeds: int = 3) -> Path:
    settings = evaluate.EvaluateParams(("abmil",), seeds)
    folder = data / target
    evaluate.main(data / "cohort", data / "bags", folder, HEADS[head], settings, seed=40)
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("head", HEADS)
def test_every_figure_can_be_recomputed_from_the_predictions(data: Path, head: str) -> None:
    out = run(data, head)
    found = json.loads((out / "metrics.json").read_text())
    rows = [row for row in table(out / "predictions.csv") if row["split"] == "test"]
    figures = []
    for seed in ("40", "41", "42"):
        mine = [row for row in rows if row["seed"] == seed]
        truth = np.array([int(row["label"]) for row in mine])
        chance = np.array([float(row["probability"]) for row in mine])
        called = (chance >= float(mine[0]["threshold"])).astype(int)
        figures.append(
            {
                "auc": sklearn_metrics.roc_auc_score(truth, chance),
                "accuracy": sklearn_metrics.accuracy_score(truth, called),
                "recall": sklearn_metrics.recall_score(truth, called),
                "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(truth, called),
                "majority_accuracy": 5 / 9,
            }
        )
    assert found.pop("slides") == {"train": 14, "val": 7, "test": 9}
    assert set(found) == set(figures[0])
    for name, value in found.items():
        column = [figure[name] for figure in figures]
        assert value["mean"] == pytest.approx(np.mean(column))
        assert value["sd"] == pytest.approx(np.std(column, ddof=1))


def test_the_files_say_what_they_promise(data: Path) -> None:
    out = run(data)
    predictions = table(out / "predictions.csv")
    assert len(predictions) == 3 * len(ROWS)
    truth = {row.slide_id: row for row in ROWS}
    for row in predictions:
        slide = truth[row["slide_id"]]
        assert (row["patient"], row["split"]) == (slide.patient, slide.split)
        assert row["label"] == str(int(slide.label == "ill"))
    attention = table(out / "attention.csv")
    for row in (row for row in ROWS if row.split == "test"):
        mine = [line for line in attention if line["slide_id"] == row.slide_id]
        assert [int(line["patch"]) for line in mine] == list(range(len(embedding_of(row))))
        assert sum(float(line["attention"]) for line in mine) == pytest.approx(1)
    assert {line["slide_id"].split("-")[0] for line in attention} == {"test"}
    curve = np.array([[float(v) for v in row.values()] for row in table(out / "roc.csv")])
    assert np.isfinite(curve).all()
    area = json.loads((out / "metrics.json").read_text())["auc"]["mean"]
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(area)


def test_poisoned_test_labels_change_the_final_figures_only(data: Path) -> None:
    honest = run(data, target="honest")
    flip = {"well": "ill", "ill": "well"}
    poisoned = [
        SlideRow(**{**vars(row), "label": flip[row.label] if row.split == "test" else row.label})
        for row in ROWS
    ]
    write_cohort(data / "cohort", poisoned)
    poison = run(data, target="poison")
    known = ("slide_id", "seed", "probability", "threshold")
    before, after = (table(folder / "predictions.csv") for folder in (honest, poison))
    assert [[a[name] for name in known] for a in before] == [
        [b[name] for name in known] for b in after
    ]
    assert (honest / "attention.csv").read_bytes() == (poison / "attention.csv").read_bytes()
    first, second = (
        json.loads((folder / "metrics.json").read_text()) for folder in (honest, poison)
    )
    assert second["auc"]["mean"] == pytest.approx(1 - first["auc"]["mean"])


def test_fitting_is_given_no_test_slide(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def fit(build: Callable, train: labelled.LabelledBags, val: labelled.LabelledBags, seed: int):
        seen.append({*train.slide_id, *val.slide_id})
        return real(build, train, val, seed)

    real = evaluate.fit
    monkeypatch.setattr(evaluate, "fit", fit)
    run(data, "meanpool")
    expected = {row.slide_id for row in ROWS if row.split != "test"}
    assert seen == [expected] * 3


def test_same_inputs_same_bytes(data: Path) -> None:
    first, second = run(data, target="first"), run(data, target="second")
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_seeds_vary_abmil_and_leave_meanpool(data: Path) -> None:
    spread = {
        head: json.loads((run(data, head, head) / "metrics.json").read_text()) for head in HEADS
    }
    assert all(value.get("sd", 0) == 0 for value in spread["meanpool"].values())
    chances = {row["probability"] for row in table(data / "abmil" / "predictions.csv")}
    assert len(chances) == 3 * len(ROWS)


def test_rejects_one_seed() -> None:
    with pytest.raises(ValueError, match=r"evaluate.seeds is 1: it must be 2 or more"):
        evaluate.EvaluateParams(("abmil",), 1)


def test_figures_match_hand_worked_ones() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    chance = np.array([0.1, 0.4, 0.8, 0.4, 0.9])
    # pairs won by class 1: 0.4 beats 0.1, ties 0.4, loses to 0.8; 0.9 beats all three
    figures = metrics.score(labels, chance, threshold=0.4)
    assert figures["auc"] == pytest.approx((1 + 0.5 + 0 + 3) / 6)
    assert figures["accuracy"] == pytest.approx(3 / 5)  # called: 0 1 1 1 1
    assert figures["recall"] == 1
    assert figures["balanced_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert figures["majority_accuracy"] == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("chance", "expected"),
    [
        ([0.1, 0.2, 0.6, 0.9], 0.5),  # separated around 0.5
        ([0.1, 0.2, 0.3, 0.9], 0.25),  # best between 0.2 and 0.3
        ([0.6, 0.7, 0.8, 0.9], 0.75),  # best between 0.7 and 0.8
        ([0.4, 0.4, 0.4, 0.4], 0.5),  # nothing to choose between
        ([0.1, 0.8, 0.6, 0.9], 0.5),  # 0.35, 0.5 and 0.85 serve alike: the nearest to 0.5
        ([0.2, 0.6, 0.4, 0.8], 0.3),  # 0.3 and 0.7 serve alike, equally far: the lower
    ],
)
def test_the_threshold_is_the_best_on_validation(chance: list[float], expected: float) -> None:
    labels = np.array([0, 0, 1, 1])
    assert metrics.threshold_from(labels, np.array(chance)) == pytest.approx(expected)


def test_the_mean_curve_has_the_mean_area() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 1] * 5 + [0] * 3)
    runs = [np.round(rng.random(13), 1) for _ in range(3)]  # with ties
    curve = metrics.mean_roc(labels, runs)
    areas = [sklearn_metrics.roc_auc_score(labels, chance) for chance in runs]
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(np.mean(areas))
    assert np.isfinite(curve).all() and tuple(curve[0, :2]) == (0, 0)
    assert (np.diff(curve[:, 2]) <= 1e-12).all() and (np.diff(curve[:, 1]) >= -1e-12).all()


def rewrite_bag(data: Path, slide_id: str, embedding: np.ndarray) -> None:
    (data / "bags" / slide_id).rename(data / f"old-{slide_id}")
    write_bag(data / "bags", slide_id, embedding)


def test_rejects_a_missing_bag(data: Path) -> None:
    (data / "bags" / "val-2").rename(data / "elsewhere")
    with pytest.raises(FileNotFoundError, match="slide val-2 has no bag at .* run `dvc repro`"):
        run(data)


def test_rejects_nan_by_slide_and_patch(data: Path) -> None:
    embedding = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)
    embedding[2, 1] = np.nan
    rewrite_bag(data, "test-3", embedding)
    with pytest.raises(ValueError, match=r"slide test-3 has NaN .* patch 2 \(1 of 4 patches\)"):
        run(data)


def test_rejects_constant_embeddings_of_a_slide(data: Path) -> None:
    rewrite_bag(data, "train-5", np.full((3, DIM), 0.3, np.float32) + np.float32(1e-8))
    with pytest.raises(ValueError, match="the 3 embeddings of slide train-5 are equal"):
        run(data)


def test_rejects_a_collapsed_encoder_even_with_one_patch_a_slide(data: Path) -> None:
    (data / "bags").rename(data / "old")
    for row in ROWS:
        write_bag(data / "bags", row.slide_id, np.ones((1, DIM), np.float32))
    with pytest.raises(ValueError, match="all embeddings in .* the encoder has collapsed"):
        run(data)


def test_accepts_slides_of_one_patch(data: Path) -> None:
    (data / "bags").rename(data / "old")
    for row in ROWS:
        write_bag(data / "bags", row.slide_id, embedding_of(row)[:1])
    assert (run(data) / "metrics.json").is_file()


def test_rejects_an_empty_bag(data: Path) -> None:
    rewrite_bag(data, "train-0", np.empty((0, DIM), np.float32))
    with pytest.raises(ValueError, match="slide train-0 has no patches"):
        run(data)


def test_rejects_embeddings_of_two_widths(data: Path) -> None:
    rewrite_bag(data, "train-1", np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32))
    with pytest.raises(ValueError, match="slide train-1 has embeddings of 11 numbers, slide .*5"):
        run(data)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_rejects_a_split_without_a_class(data: Path, split: str) -> None:
    kept = [row for row in ROWS if row.split != split or row.label == "well"]
    write_cohort(data / "cohort", kept)
    with pytest.raises(ValueError, match=f"split {split} has no slide of class ill"):
        run(data)


def test_rejects_one_patient(data: Path) -> None:
    write_cohort(data / "cohort", [SlideRow(**{**vars(row), "patient": "A"}) for row in ROWS])
    with pytest.raises(ValueError, match="all slides are of one patient, A"):
        run(data)


def test_rejects_a_patient_in_two_splits(data: Path) -> None:
    rows = [
        SlideRow(**{**vars(row), "patient": "A" if row.slide_id.endswith("-1") else row.patient})
        for row in ROWS
    ]
    write_cohort(data / "cohort", rows)
    with pytest.raises(ValueError, match="patient A is in the splits test, train, val"):
        run(data)


def test_rejects_three_classes(data: Path) -> None:
    write_cohort(data / "cohort", ROWS, ("well", "ill", "unclear"))
    with pytest.raises(ValueError, match=r"has 3 classes \(well, ill, unclear\)"):
        run(data)


def test_rejects_a_missing_cohort(data: Path) -> None:
    (data / "cohort" / "cohort.csv").unlink()
    with pytest.raises(FileNotFoundError, match="dvc repro cohort"):
        run(data)


def test_nothing_is_written_when_input_is_bad(data: Path) -> None:
    (data / "bags" / "val-2").rename(data / "elsewhere")
    with pytest.raises(FileNotFoundError):
        run(data)
    assert not (data / "out").exists()
