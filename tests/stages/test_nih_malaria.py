"""NIH malaria: fields with annotations, and cells cut out of them."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import cohort as stage
from stages.common import cohort
from stages.sources import nih_malaria
from tests.stages import published
from tests.stages.published import (
    CELLS,
    FIELDS,
    LABELS,
    NAMES,
    annotate,
    listed,
    paint,
    refused,
    tiled,
    use,
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    published.move_to(tmp_path, monkeypatch)


@pytest.fixture
def thin(monkeypatch) -> Path:
    return published.make_thin(monkeypatch)


@pytest.fixture
def cells(monkeypatch) -> Path:
    return published.make_cells(monkeypatch)


def test_a_field_is_positive_when_a_parasitized_cell_is_marked_in_it(thin, caplog):
    caplog.set_level(logging.INFO)
    rows = listed("nih_malaria", FIELDS)
    for row in rows:
        patient, stem = row.slide_id.rsplit("-", 1)
        infected = {**NAMES["Polygon Set"], **NAMES["Point Set"]}[patient]
        assert row.label == LABELS[int(stem[-2:]) < infected], row
    assert Counter(row.label for row in rows) == {"positive": 19, "negative": 21}
    assert "19 of 40 fields have parasitized cells, in 5 of 8 patients' folders" in caplog.text


def test_a_field_takes_its_patients_label_when_asked(thin):
    rows = listed("nih_malaria", {**FIELDS, "label_of": "patient"})
    by_patient = {row.patient: row.label for row in rows}
    assert [name for name, label in by_patient.items() if label == "negative"] == [
        "C7",
        "C225",
        "C236",
    ]
    assert all(row.label == by_patient[row.patient] for row in rows)


def test_two_folders_of_one_patient_are_one_patient(thin):
    rows = listed("nih_malaria", FIELDS)
    assert Counter(row.patient for row in rows)["C47"] == 10
    assert len({row.patient for row in rows}) == 7 and len({row.slide_id for row in rows}) == 40


def test_fields_pass_the_cohort_stage_and_patients_stay_together(thin):
    for at in range(9, 12):  # three more infected patients, for three splits of either class
        folder = thin / "Point Set" / f"30{at}C{at}P{at}ThinF"
        for number in range(5):
            paint(folder / "Img" / f"IMG_{number}.jpg", 100 * at + number)
            annotate(folder / "GT" / f"IMG_{number}.txt", True)
    nih_malaria.PATIENTS["Point Set"], nih_malaria.SETS["Point Set"] = 8, 40  # restored by `thin`
    use("nih_malaria", FIELDS, "positive")
    stage.main()
    rows = cohort.read_rows()
    splits = {row.patient: row.split for row in rows}
    assert all(splits[row.patient] == row.split for row in rows) and len(splits) == 10


def test_what_is_wrong_with_fields_is_told_at_once(thin):
    polygon, point = thin / "Polygon Set", thin / "Point Set"
    (polygon / "244C7NthinF" / "GT" / "IMG_20150813_143502.txt").unlink()
    (polygon / "142C38P3thinF_original" / "Img" / "IMG_20150813_143500.jpg").unlink()
    (point / "344C225ThinF").rename(point / "unnamed")
    annotation = point / "234C92P53ThinF" / "GT" / "IMG_20150813_143501.txt"
    annotation.write_text("1,5312,2988\n1,Parasitised,No_Comment,Point,1,1,1\n")
    (point / "345C236ThinF" / "GT" / "IMG_20150813_143501.txt").write_text("0,5312,2988\n")
    message = refused("nih_malaria", FIELDS, "cohort.nih_malaria has 7 problems")
    for told in (
        "142C38P3thinF_original has 4 images and 5 are published",
        "Polygon Set has 14 images and 15 are published: copy the rest, or set",
        "unnamed names no patient: the published names are as 142C38P3thinF",
        "no 244C7NthinF/GT/IMG_20150813_143502.txt: IMG_20150813_143502.jpg has no label",
        "234C92P53ThinF/GT/IMG_20150813_143501.txt has a cell of type 'Parasitised': known are",
        "345C236ThinF/GT/IMG_20150813_143501.txt annotates no cells",
    ):
        assert told in message, told


def test_one_of_the_two_sets_is_a_subset(thin):
    (thin / "Point Set").rename("elsewhere")
    refused("nih_malaria", FIELDS, "thin has no folder Point Set")
    assert len(listed("nih_malaria", {**FIELDS, "subset": True})) == 15


def test_cells_take_label_from_folder_and_patient_from_name(cells):
    rows = listed("nih_malaria", {**CELLS, "frame_px": 0})
    assert Counter(row.label for row in rows) == {"positive": 6, "negative": 10}
    assert [row.patient for row in rows].count("C30") == 2
    assert rows[0].path == "cells/Parasitized/C30P1thinF_IMG_20150619_114756a_cell_0.png"


def test_a_cell_that_names_no_patient_is_told(cells):
    file = next((cells / "Uninfected").iterdir())
    file.rename(cells / "Uninfected" / "000001_uninfected.png")
    refused("nih_malaria", CELLS, "000001_uninfected.png names no patient: the published names")


def test_framed_cells_lie_whole_in_the_middle_of_black(cells):
    row = listed("nih_malaria", CELLS)[2]
    framed = np.asarray(Image.open(row.path))
    cell = np.asarray(Image.open(cells / "Parasitized" / f"{row.slide_id}.png"))
    height, width = cell.shape[:2]
    left, top = (61 - width) // 2, (61 - height) // 2
    assert framed.shape == (61, 61, 3)
    np.testing.assert_array_equal(framed[top : top + height, left : left + width], cell)
    assert framed.astype(int).sum() == cell.astype(int).sum()  # all else is black


def test_frames_of_an_earlier_run_are_gone(cells):
    first = listed("nih_malaria", CELLS)
    Path(first[0].path).with_name("stale.png").touch()
    assert listed("nih_malaria", CELLS) == first
    assert len([file for file in Path("data/cohort/slides").rglob("*") if file.is_file()]) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_px": 61, "collection": "fields"}, "frame_px is 61: it must be 0 with fields"),
        ({"frame_px": -1}, "frame_px is -1: it must be 0 with fields, and 0 or more with cells"),
        ({"label_of": "patient"}, "label_of is patient: a cell has its own label, set image"),
    ],
)
def test_params_that_the_collection_has_no_use_for_are_refused(changes, message):
    refused("nih_malaria", {**CELLS, **changes}, message)


def test_a_frame_too_small_and_a_damaged_cell_are_told(cells):
    file = sorted((cells / "Uninfected").iterdir())[0]
    file.write_bytes(file.read_bytes()[:200])
    message = refused("nih_malaria", {**CELLS, "frame_px": 51}, "has 2 problems")
    assert "is 52 x 41 px and cohort.nih_malaria.frame_px is 51: set it to 52 or more" in message
    assert f"slide {file.name} is damaged" in message


def test_framed_cells_are_one_patch_each_and_bare_ones_too_small(cells):
    use("nih_malaria", CELLS, "positive")
    stage.main()
    rows = cohort.read_rows()
    found = tiled(rows, 61, 0.06)
    assert [len(store) for store in found] == [1] * 16
    np.testing.assert_array_equal(found[3][0], np.asarray(Image.open(rows[3].path)))
    bare = listed("nih_malaria", {**CELLS, "frame_px": 0})
    with pytest.raises(ValueError, match=r"is 37 x 41 px at 0.06 mpp, smaller than a patch"):
        tiled(bare[:1], 61, 0.06)
