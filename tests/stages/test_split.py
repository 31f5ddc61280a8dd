"""Splits: made once, by patient, no class left out, the same bytes each time."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from stages import split
from stages.common import cohort, failures, splits
from stages.common.cohort import SlideRow

LABELS = ("well", "ill", "unclear")


def rows_of(patients: int, classes: int, slides: int = 2) -> list[SlideRow]:
    """`slides` slides of each patient; patients of all classes in turn."""
    return [
        SlideRow(f"s{who}-{at}", "", LABELS[who % classes], f"p{who}", part(who), "0.5", "")
        for who in range(patients)
        for at in range(slides)
    ]


def part(who: int) -> str:
    return ("train", "train", "train", "val", "val", "val", "test", "test", "test")[who % 9]


def run(folder: Path, rows: list[SlideRow], classes: int = 2, **changes: object) -> splits.Splits:
    (folder / "cohort").mkdir(exist_ok=True)
    cohort.write_rows(folder / "cohort", rows, list(LABELS[:classes]))
    section = {"protocol": "crossval", "repeats": 3, "folds": 4, "val_share": 0.3, **changes}
    values = {"seed": 7, "sparse_topk": 0, "irpe": "none", "split": section}
    values["embed"] = {"encoders": ["one", "other"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    split.main(folder / "cohort", folder / "split", folder / "params.yaml")
    return splits.read(folder / "split")


@pytest.mark.parametrize("classes", [2, 3])
def test_each_patient_is_tested_once_a_repeat_and_never_in_two_parts(tmp_path, classes):
    table = run(tmp_path, rows_of(27, classes), classes).table
    assert table.groupby(splits.KEYS).size().tolist() == [54] * 12
    assert (table.groupby([*splits.KEYS, "patient"]).split.nunique() == 1).all()
    tested = table[table.split == "test"].groupby(["repeat", "slide_id"]).size()
    assert len(tested) == 3 * 54 and (tested == 1).all()
    counts = table.groupby([*splits.KEYS, "split", "label"]).patient.nunique().unstack()
    assert counts.notna().all(axis=None) and len(counts) == 12 * 3
    tests = counts.xs("test", level="split")
    assert (tests.max() - tests.min() <= 1).all()


def test_slides_without_a_bag_of_every_encoder_are_in_no_split(tmp_path):
    whole = run(tmp_path, rows_of(20, 2))
    assert failures.read(tmp_path / "split") == {}
    failures.write(tmp_path / "tile", {"s3-0": "is cut short", "s3-1": "is cut short"})
    failures.write(tmp_path / "embed/other", {"s5-1": "gone"})
    failures.write(tmp_path / "embed/of_before", {"s6-0": "not in params.yaml any more"})
    rest = run(tmp_path, rows_of(20, 2))
    left_out = {"s3-0", "s3-1", "s5-1"}
    assert set(whole.table.slide_id) - set(rest.table.slide_id) == left_out
    reasons = {"s3-0": "tile: is cut short", "s5-1": "embed other: gone"}
    assert reasons.items() <= failures.read(tmp_path / "split").items()


def test_repeats_differ_and_the_same_seed_gives_the_same_bytes(tmp_path):
    first = run(tmp_path, rows_of(20, 2))
    before = (tmp_path / "split/splits.csv").read_bytes()
    assert run(tmp_path, rows_of(20, 2)).digest == first.digest
    assert (tmp_path / "split/splits.csv").read_bytes() == before
    tests = first.table[(first.table.split == "test") & (first.table.fold == 0)]
    assert len({tuple(rows.slide_id) for _, rows in tests.groupby("repeat")}) == 3


def test_a_patient_with_two_labels_counts_as_the_rarer(tmp_path):
    rows = rows_of(12, 2)
    rows += [SlideRow("mixed", "", "ill", "p0", "train", "0.5", "")]
    label = splits._label_of_patients(rows + [SlideRow("w", "", "well", "p2", "train", "0.5", "")])
    assert label["p0"] == "ill" and label["p2"] == "well"
    assert (run(tmp_path, rows).table.groupby([*splits.KEYS, "patient"]).split.nunique() == 1).all()


def test_holdout_is_the_cohorts_own_split(tmp_path):
    rows = rows_of(18, 2)
    found = run(tmp_path, rows, protocol="holdout").table
    assert found.split.tolist() == [row.split for row in rows]
    assert set(zip(found.repeat, found.fold, strict=True)) == {(0, 0)}


def test_the_optimistic_protocol_has_no_validation_slides(tmp_path):
    rows = rows_of(18, 2)
    found = run(tmp_path, rows, protocol="paper_optimistic")
    assert found.protocol == "paper_optimistic"
    assert found.table.split.tolist() == [
        "test" if row.split == "test" else "train" for row in rows
    ]


def test_rejects_classes_with_too_few_patients(tmp_path):
    with pytest.raises(ValueError, match="class ill has 3 patients: 4 folds need 4 or more"):
        run(tmp_path, rows_of(6, 2))
    with pytest.raises(ValueError, match="class ill has 2 patients: 2 folds need 4 or more"):
        run(tmp_path, rows_of(4, 2), folds=2)
    assert len(run(tmp_path, rows_of(6, 2), folds=3).table) == 3 * 3 * 12


def test_rejects_one_patient_and_a_patient_in_two_parts(tmp_path):
    rows = rows_of(18, 2)
    one = [SlideRow(**{**vars(row), "patient": "A"}) for row in rows]
    with pytest.raises(ValueError, match="all slides are of one patient, A"):
        splits.check(
            pd.DataFrame([vars(row) | {"repeat": 0, "fold": 0} for row in one]), (), LABELS
        )
    crossed = splits.holdout(rows)
    crossed.loc[0, "split"] = "test"
    with pytest.raises(ValueError, match="patient p0 is in two parts of repeat 0, fold 0"):
        splits.check(crossed, cohort.SPLITS, LABELS[:2])


def test_rejects_a_part_without_a_class(tmp_path):
    rows = [row for row in rows_of(18, 2) if (row.split, row.label) != ("val", "ill")]
    with pytest.raises(ValueError, match="val of repeat 0, fold 0 has no slide of class ill"):
        run(tmp_path, rows, protocol="holdout")


def test_rejects_a_table_that_was_changed(tmp_path):
    run(tmp_path, rows_of(20, 2))
    file = tmp_path / "split/splits.csv"
    file.write_text(file.read_text().replace("test", "train", 1))
    with pytest.raises(ValueError, match="is not what was written"):
        splits.read(tmp_path / "split")


def test_reads_ids_that_look_like_numbers_or_nothing_as_text(tmp_path):
    rows = [
        SlideRow(**{**vars(row), "slide_id": f"00{at}", "patient": f"0{at // 2}"})
        for at, row in enumerate(rows_of(20, 2))
    ]
    rows[0] = SlideRow(**{**vars(rows[0]), "slide_id": "NA"})
    found = run(tmp_path, rows).table
    assert {"NA", "001"} <= set(found.slide_id) and "01" in set(found.patient)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("repeats", 0, "split.repeats is 0"),
        ("folds", 1, "split.folds is 1"),
        ("val_share", 1.0, "split.val_share is 1.0"),
        ("protocol", "loo", "must be one of holdout, crossval, paper_optimistic"),
    ],
)
def test_rejects_settings_out_of_range(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, rows_of(20, 2), **{key: value})


def test_rejects_a_missing_cohort_and_missing_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro split"):
        splits.read(tmp_path)
