"""Compare: Table 1 and the comparisons say what the cells' files say, and which is the best."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from stages import compare
from stages.common import cohort, metrics, run, table1
from tests.common.predicted import predictions

ENCODERS, HEADS, CLASSES = ("ours", "theirs", "none"), ("less", "abmil"), ["well", "ill"]
SANITY = {"sanity_permuted_labels_auc": 0.4321, "sanity_random_features_auc": 0.5432}
CURVES = ("roc.csv", "pr.csv", "calibration.csv")
FILES = ("comparisons.csv", "metrics.json", "table1.csv", "table1.md", "table1.png", *CURVES)


def write_cells(root: Path, prefix: str = "", protocol: str = "holdout", **settings: int) -> None:
    """What evaluate leaves: `ours` is the best, `none` knows nothing."""
    data = root / "data"
    for folder in ("cohort", "split"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    classes = [*CLASSES, "unclear"][: settings.get("classes", 2)]
    cohort.write_rows(data / "cohort", [], classes)
    split = json.dumps({"protocol": protocol, "digest": "12ab"})
    (data / "split" / "splits.json").write_text(split)
    for head in HEADS:
        for encoder, signal in zip(ENCODERS, (3.0, 1.5, 0.0), strict=True):
            number = ENCODERS.index(encoder) + 3 * HEADS.index(head)
            table = predictions(**settings, signal=signal, encoder=number)
            folder = data / "evaluate" / encoder / head
            folder.mkdir(parents=True, exist_ok=True)
            table.to_parquet(folder / "predictions.parquet", index=False)
            (folder / "split.json").write_text(split)
            for name, curve in metrics.curves(table, classes).items():
                curve.to_csv(folder / f"{name}.csv", index=False)
            figures = metrics.cell(table, classes) | SANITY
            run.write_metrics(
                folder / "metrics.json", {prefix + name: value for name, value in figures.items()}
            )


def write_settings(root: Path, reference: str = "ours") -> None:
    settings = {"seed": 7, "sparse_topk": 0, "irpe": "none"}
    settings |= {"embed": {"encoders": list(ENCODERS)}, "evaluate": {"heads": list(HEADS)}}
    settings |= {"compare": {"reference": reference, "resamples": 200}}
    (root / "params.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_cells(root, slides=120)
    write_settings(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "root")


def compared(root: Path) -> Path:
    target = root / "data" / "compare"
    compare.main(root / "data", target, root / "params.yaml")
    return target


def test_the_table_holds_the_cells_figures(root: Path) -> None:
    table = pd.read_csv(compared(root) / "table1.csv", keep_default_na=False, na_values=[""])
    shown = table[~table1.is_sanity(table)]
    assert list(zip(shown["head"], shown["encoder"], strict=True)) == [
        (head, encoder) for head in HEADS for encoder in ENCODERS
    ]
    for _, row in shown.iterrows():
        cell = root / "data" / "evaluate" / row.encoder / row["head"] / "metrics.json"
        figures = json.loads(cell.read_text())
        for column, name in (
            ("auc", "auc"),
            ("auc_low", "auc_delong_low"),
            ("recall_high", "recall_wilson_high"),
            ("balanced_accuracy", "balanced_accuracy"),
        ):
            assert row[column] == pytest.approx(figures[name], abs=1e-12)
    assert shown.auc_place.tolist() == [1, 2, 3] * 2


def test_sanity_rows_stand_below_each_head_and_never_win(root: Path) -> None:
    for cell in (root / "data" / "evaluate").glob("*/*/metrics.json"):
        figures = json.loads(cell.read_text()) | {"sanity_random_features_auc": 1.0}
        cell.write_text(json.dumps(figures))
    text = (compared(root) / "table1.md").read_text()
    for head in HEADS:
        assert f"| {head} | (permuted labels) | 0.432 |" in text
        assert f"| {head} | (random features) | 1.000 |" in text
        assert text.count("**") == 2 * 2 * 3  # two heads, three ranked figures


def test_the_best_is_bold_the_second_underlined_and_ties_share() -> None:
    figures = {"auc": 0.9, "accuracy": 0.8, "balanced_accuracy": 0.7, "recall": 1.0}
    cells = {
        ("a", "h"): figures,
        ("b", "h"): figures | {"auc": 0.90004, "accuracy": 0.79},
        ("c", "h"): figures | {"auc": 0.89, "balanced_accuracy": 0.71},
    }
    lines = table1.markdown(table1.rows_of(cells), "").splitlines()[4:]
    assert lines == [
        "| h | a | **0.900** | <u>0.700</u> | **0.800** | 1.000 |",
        "| h | b | **0.900** | <u>0.700</u> | 0.790 | 1.000 |",
        "| h | c | 0.890 | **0.710** | **0.800** | 1.000 |",
    ]


def test_of_two_encoders_the_second_is_not_marked() -> None:
    cells = {("a", "h"): {"auc": 0.9}, ("b", "h"): {"auc": 0.8}}
    table = table1.rows_of(
        {at: cell | {"accuracy": 0.5, "balanced_accuracy": 0.5} for at, cell in cells.items()}
    )
    assert "<u>" not in table1.markdown(table, "")


def test_every_comparison_is_with_the_reference(root: Path) -> None:
    table = pd.read_csv(compared(root) / "comparisons.csv", keep_default_na=False)
    rows = table[["head", "encoder", "other"]].to_numpy().tolist()
    assert rows == [[head, "ours", other] for head in HEADS for other in ("theirs", "none")]
    assert (table.auc_difference > 0).all() and (table.p_holm >= table.p).all()
    found = json.loads((root / "data" / "compare" / "metrics.json").read_text())
    assert found["cells"] == 6 and found["comparisons"] == 4
    assert found["significant_after_holm"] == (table.p_holm < 0.05).sum() >= 2
    name = "abmil_ours_minus_none_auc"
    assert found[name] == pytest.approx(table.auc_difference.iloc[3])
    assert found[f"{name}_p_holm"] == pytest.approx(table.p_holm.iloc[3])


def test_optimistic_numbers_are_called_so_everywhere(root: Path) -> None:
    shutil.rmtree(root / "data")
    write_cells(root, "optimistic_", "paper_optimistic", slides=120)
    target = compared(root)
    text = (target / "table1.md").read_text()
    assert text.startswith("Optimistic: epoch and threshold were chosen on the test slides")
    assert text.splitlines()[2].count("(optimistic)") == 5 and "(permuted labels) | 0.432" in text
    found = json.loads((target / "metrics.json").read_text())
    assert all(
        name.startswith("optimistic_") for name in found if name[-5:] not in ("cells", "isons")
    )
    assert set(pd.read_csv(target / "comparisons.csv").protocol) == {"paper_optimistic"}
    columns = pd.read_csv(target / "table1.csv").columns[2:]
    assert all(name.startswith("optimistic_") for name in columns)


def test_cells_of_two_protocols_do_not_mix(root: Path) -> None:
    cell = root / "data" / "evaluate" / "ours" / "less" / "metrics.json"
    cell.write_text(cell.read_text().replace('"auc"', '"optimistic_auc"'))
    with pytest.raises(ValueError, match="some cells .* paper_optimistic and some are not"):
        compared(root)


def test_folds_and_repeats_are_compared_by_the_resampled_t(root: Path) -> None:
    shutil.rmtree(root / "data")
    write_cells(root, protocol="crossval", slides=60, repeats=2, folds=3, seeds=2)
    target = compared(root)
    table = pd.read_csv(target / "comparisons.csv")
    assert set(table.test) == {"resampled_t"}
    text = (target / "table1.md").read_text()
    assert "Mean over 6 splits and 2 seeds of each (protocol crossval), on 60 test slides" in text


def test_three_classes_have_no_recall_of_one(root: Path) -> None:
    shutil.rmtree(root / "data")
    write_cells(root, slides=120, classes=3)
    target = compared(root)
    lines = (target / "table1.md").read_text().splitlines()
    assert lines[2] == "| Head | Encoder | AUC | Balanced accuracy | Accuracy |"
    table = pd.read_csv(target / "comparisons.csv", keep_default_na=False)
    assert (table.auc_difference > 0).all() and set(table.test) == {"delong"}


def test_the_same_inputs_give_the_same_bytes(root: Path) -> None:
    target = compared(root)
    first = {name: (target / name).read_bytes() for name in FILES}
    compared(root)
    assert {name: (target / name).read_bytes() for name in FILES} == first
    assert sorted(file.name for file in target.iterdir()) == sorted([*FILES, "cells", "confusion"])


def test_the_picture_has_a_row_for_each_cell(root: Path) -> None:
    with Image.open(compared(root) / "table1.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] > pixels.shape[0] > 300
    left = (pixels[:, : pixels.shape[1] // 8] < 128).any(1)
    written = np.flatnonzero(np.diff(left.astype(int)) == 1)
    assert len(written) >= 1 + len(HEADS)


def test_every_cells_figures_and_curves_are_gathered_for_dvc(root: Path) -> None:
    target = compared(root)
    names = {f"{head}-{encoder}" for head in HEADS for encoder in ENCODERS}
    for kind in ("cells", "confusion"):
        assert {file.stem for file in (target / kind).iterdir()} == names
    for head, encoder in ((head, encoder) for head in HEADS for encoder in ENCODERS):
        cell = root / "data" / "evaluate" / encoder / head
        gathered = target / "cells" / f"{head}-{encoder}.json"
        assert gathered.read_bytes() == (cell / "metrics.json").read_bytes()
        for name in CURVES:
            table, whole = pd.read_csv(target / name), pd.read_csv(cell / name)
            mine = table[table.cell == f"{head} {encoder}"]
            ends = [0, -1] if name != "calibration.csv" else [-1]
            assert mine.iloc[ends, 0].tolist() == whole[mine.columns[0]].iloc[ends].tolist()
    calibration = pd.read_csv(target / "calibration.csv")
    assert set(calibration.scaling) == {"after"}


@pytest.mark.parametrize("key", ["protocol", "digest"])
def test_rejects_cells_of_other_splits(root: Path, key: str) -> None:
    file = root / "data" / "evaluate" / "theirs" / "less" / "split.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "other"}))
    with pytest.raises(ValueError, match=r"theirs/less was made on other splits .*repro evaluate"):
        compared(root)


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("evaluate/theirs/less/predictions.parquet", "evaluate"),
        ("evaluate/theirs/less/metrics.json", "evaluate"),
        ("evaluate/theirs/less/split.json", "evaluate"),
        ("evaluate/theirs/less/roc.csv", "evaluate"),
        ("evaluate/theirs/less/confusion.csv", "evaluate"),
        ("split/splits.json", "split"),
        ("cohort/classes.json", "cohort"),
    ],
)
def test_a_missing_input_names_its_stage(root: Path, path: str, stage: str) -> None:
    (root / "data" / path).unlink()
    with pytest.raises(FileNotFoundError, match=f"run `dvc repro {stage}`"):
        compared(root)


def test_rejects_encoders_of_different_slides(root: Path) -> None:
    file = root / "data" / "evaluate" / "theirs" / "less" / "predictions.parquet"
    table = pd.read_parquet(file)
    table["slide_id"] = "x" + table["slide_id"]
    table.to_parquet(file, index=False)
    with pytest.raises(ValueError, match="ours and theirs were not scored on the same splits"):
        compared(root)


def test_rejects_a_reference_that_is_no_encoder(root: Path) -> None:
    write_settings(root, "other")
    with pytest.raises(ValueError, match="compare.reference is other: it must be empty or one of"):
        compared(root)


def test_rejects_too_few_resamples() -> None:
    with pytest.raises(ValueError, match="compare.resamples is 99: it must be 100 or more"):
        compare.CompareParams("", 99)
