"""FNAC 2019 and NIH malaria: small folders with the published layout, and what may be wrong."""

import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stages import cohort as stage
from stages import index, tile
from stages.common import cohort, stores
from stages.common.perslide import Job
from stages.sources import fnac2019, nih_malaria
from stages.tile import TileParams

ROOT = Path(__file__).resolve().parents[2]
WIDE, HIGH = 67, 53
FNAC = {"slides": "fnac", "mpp": 0.25, "subset": False}
FIELDS = {
    "slides": "thin",
    "collection": "fields",
    "label_of": "image",
    "frame_px": 0,
    "mpp": 0.06,
    "subset": False,
}
CELLS = {**FIELDS, "slides": "cells", "collection": "cells", "frame_px": 61}
NAMES = {  # folder: infected images of five, as the release names its patients
    "Polygon Set": {
        "142C38P3thinF_original": 3,
        "146C47P8thin_Original_Motic": 5,
        "244C7NthinF": 0,
    },
    "Point Set": {
        "148C47P8thinOriginalOlympusCX21": 5,
        "234C92P53ThinF": 1,
        "208C67P28N_ThinF": 5,
        "344C225ThinF": 0,
        "345C236ThinF": 0,
    },
}
LABELS = {False: "negative", True: "positive"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CYTOSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DVC_ROOT", raising=False)


def paint(file: Path, seed: int, width: int = WIDE, height: int = HIGH) -> Path:
    """A bright image with a dark spot, unlike any of another seed."""
    pixels = np.random.default_rng(seed).integers(225, 245, (height, width, 3), np.uint8)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = 40
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def fnac(monkeypatch) -> Path:
    monkeypatch.setattr(fnac2019, "COUNTS", {"B": 5, "M": 7})
    monkeypatch.setattr(fnac2019, "EXTENT", (WIDE, HIGH))
    for at in range(12):
        name, number = ("B", at + 1) if at < 5 else ("M", at - 4)  # numbered alike, as folders are
        paint(Path("fnac") / name / f"{name} ({number}).png", at)
    Path("fnac/B/Thumbs.db").write_bytes(b"no image")
    Path("fnac/B/._B (1).png").write_bytes(b"what macOS leaves on foreign disks")
    return Path("fnac")


@pytest.fixture
def thin(monkeypatch) -> Path:
    monkeypatch.setattr(nih_malaria, "PATIENTS", {"Polygon Set": 3, "Point Set": 5})
    monkeypatch.setattr(nih_malaria, "SETS", {"Polygon Set": 15, "Point Set": 25})
    monkeypatch.setattr(nih_malaria, "EXTENT", (WIDE, HIGH))
    seed = 0
    for name, patients in NAMES.items():
        for patient, infected in patients.items():
            for at in range(5):
                seed += 1
                stem = f"IMG_20150813_1435{at:02d}"  # the same minute at two patients
                paint(Path("thin") / name / patient / "Img" / f"{stem}.jpg", seed)
                annotate(Path("thin") / name / patient / "GT" / f"{stem}.txt", at < infected)
    return Path("thin")


def annotate(file: Path, infected: bool) -> None:
    file.parent.mkdir(exist_ok=True)
    kinds = ["Uninfected", "White_Blood_Cell"] + ["Parasitized"] * infected
    lines = [f"{at},{kind},No_Comment,Point,1,10.5,20.5" for at, kind in enumerate(kinds, 1)]
    file.write_text("\n".join([f"{len(kinds)},5312,2988", *lines]) + "\n")


@pytest.fixture
def cells(monkeypatch) -> Path:
    monkeypatch.setattr(nih_malaria, "CELLS", {"Parasitized": 6, "Uninfected": 10})
    for at in range(16):
        infected = at < 6
        patient = f"C{at + 30}P{at + 1}thinF" if at < 12 else f"C{at + 200}ThinF"
        patient = "C30P1thinF" if at == 7 else patient  # an uninfected cell of an infected patient
        name = f"{patient}_IMG_20150619_114756a_cell_{at}.png"
        folder = Path("cells") / ("Parasitized" if infected else "Uninfected")
        paint(folder / name, at, 37 + at, 41)
    return Path("cells")


def use(source: str, settings: dict[str, object], positive: str) -> None:
    """The demo's params with this source, and shares that few patients allow."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["cohort"] |= {"source": source, "positive": positive, source: settings}
    Path("params.yaml").write_text(yaml.safe_dump(values))


def listed(source: str, settings: dict[str, object]) -> list[cohort.SlideRow]:
    module = {"fnac2019": fnac2019, "nih_malaria": nih_malaria}[source]
    return module.build(module.Params(**settings), 1, Path("data/cohort"))


def test_fnac_lists_both_classes_each_image_its_own_patient(fnac, caplog):
    caplog.set_level(logging.WARNING)
    rows = listed("fnac2019", FNAC)
    assert Counter(row.label for row in rows) == {"benign": 5, "malignant": 7}
    assert len({row.patient for row in rows}) == 12
    first = rows[0]
    assert (first.slide_id, first.path, first.mpp) == ("B-B (1)", "fnac/B/B (1).png", "0.25")
    assert "fnac2019 names no patients: each of the 12 images counts as one" in caplog.text


def test_fnac_passes_the_cohort_stage(fnac):
    use("fnac2019", FNAC, "malignant")
    stage.main()
    assert cohort.read_classes() == ["benign", "malignant"]
    assert {row.mpp for row in cohort.read_rows()} == {"0.25"}


def test_the_published_counts_are_asked_for():
    assert sum(fnac2019.COUNTS.values()) == 212 and fnac2019.COUNTS["M"] == 113
    assert sum(nih_malaria.SETS.values()) == 965 and sum(nih_malaria.PATIENTS.values()) == 193
    assert sum(nih_malaria.CELLS.values()) == 27_558
    for name, images in nih_malaria.SETS.items():
        assert images == nih_malaria.PER_PATIENT * nih_malaria.PATIENTS[name]


def refused(source: str, settings: dict[str, object], message: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        listed(source, settings)
    assert re.search(message, str(caught.value)), str(caught.value)
    return str(caught.value)


def test_absent_folders_are_told():
    refused("fnac2019", FNAC, r"no folder fnac: unpack FNAC 2019 .* or set cohort.fnac2019.slides")
    refused("nih_malaria", FIELDS, r"no folder thin: unpack NIH-NLM-ThinBloodSmearsPf \(lhncbc")
    refused("nih_malaria", CELLS, r"no folder cells: unpack cell_images.zip")


def test_class_folders_absent_misnamed_or_deeper_are_told(fnac, cells):
    (fnac / "M").rename(fnac / "malignant")
    refused("fnac2019", FNAC, "fnac has no folder M: it has B, malignant; the published ones are B")
    (cells / "Parasitized").rename(cells / "parasitised")
    refused("nih_malaria", CELLS, "no folder Parasitized: .*: rename parasitised to Parasitized")
    (cells / "parasitised").rename(cells / "Parasitized")
    Path("outer").mkdir()
    cells.rename("outer/cell_images")
    settings = {**CELLS, "slides": "outer"}
    refused("nih_malaria", settings, "but outer/cell_images has: set cohort.nih_malaria.slides to")


def test_fewer_images_than_published_need_the_params_leave(fnac):
    (fnac / "B" / "B (3).png").unlink()
    refused("fnac2019", FNAC, r"B has 4 images and 5 are published: copy the rest, or set .*subset")
    assert len(listed("fnac2019", {**FNAC, "subset": True})) == 11
    for file in (fnac / "B").iterdir():
        file.unlink()
    refused("fnac2019", {**FNAC, "subset": True}, "B has 0 images and 5 are published: unpack")


def test_more_images_than_published_are_no_subset(fnac):
    paint(fnac / "M" / "rotated.png", 99)
    refused("fnac2019", {**FNAC, "subset": True}, "M has 8 images and 7 are published: take out")


def test_resized_images_are_refused_and_turned_ones_taken(fnac):
    paint(fnac / "M" / "M (2).png", 50, HIGH, WIDE)
    assert len(listed("fnac2019", FNAC)) == 12
    paint(fnac / "M" / "M (4).png", 51, WIDE // 2, HIGH // 2)
    message = r"1 images are not the published 67 x 53 px \(M \(4\).png 33 x 26\): resized ones"
    refused("fnac2019", FNAC, message)


@pytest.mark.parametrize(("source", "settings"), [("fnac2019", FNAC), ("nih_malaria", FIELDS)])
def test_an_mpp_that_is_not_set_is_asked_for(fnac, thin, source, settings):
    message = rf"cohort.{source}.mpp is 0 and none is published: measure the microns per pixel"
    refused(source, {**settings, "mpp": 0.0}, message)


def test_a_damaged_image_is_named_by_the_cohort_stage(fnac):
    file = fnac / "M" / "M (4).png"
    file.write_bytes(file.read_bytes()[:300])
    (fnac / "B" / "B (1).png").write_bytes(b"")
    use("fnac2019", FNAC, "malignant")
    with pytest.raises(ValueError, match=r"2 problems") as caught:
        stage.main()
    assert "slide M (4).png is damaged" in str(caught.value)
    assert "slide B (1).png has 0 bytes" in str(caught.value)


def test_a_copy_under_another_name_is_refused_and_a_subset_without_it_passes(fnac):
    (fnac / "M" / "M (5).png").write_bytes((fnac / "B" / "B (2).png").read_bytes())
    use("fnac2019", FNAC, "malignant")
    with pytest.raises(ValueError, match=r"B-B \(2\) .* and M-M \(5\) .* have the same content"):
        stage.main()
    (fnac / "M" / "M (5).png").unlink()
    use("fnac2019", {**FNAC, "subset": True}, "malignant")
    stage.main()
    assert len(cohort.read_rows()) == 11


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


def tiled(rows: list[cohort.SlideRow], patch_px: int, mpp: float) -> list[stores.PatchStore]:
    settings = TileParams(mpp, patch_px, "grid", 9, patch_px, 0.15, 1e-6, "zstd")
    found = []
    for row in rows:
        folder = Path("out") / row.path
        folder.mkdir(parents=True)
        arguments = {"row": row, "params": settings, "seed": 0}
        tile.make(folder, Job(row.slide_id, (row.digest,), arguments))
        found.append(stores.open_patches(folder / "patches.zarr"))
    return found


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


def test_images_of_fnac_are_tiled_by_a_sliding_window(fnac):
    use("fnac2019", FNAC, "malignant")
    stage.main()
    (store,) = tiled(cohort.read_rows()[:1], 31, 0.25)
    assert [tuple(map(int, corner)) for corner in store.origin] == [(0, 0)]


def test_the_index_lists_these_folders_and_sees_a_change(fnac, thin):
    use("fnac2019", FNAC, "malignant")
    index.main()
    before = Path("data/index/slides.csv").read_text()
    assert before.count("B/B (") == 5 and before.count("M/M (") == 7
    paint(fnac / "M" / "M (1).png", 77)
    index.main()
    assert Path("data/index/slides.csv").read_text() != before
    use("nih_malaria", FIELDS, "positive")
    index.main()
    text = Path("data/index/slides.csv").read_text()
    assert text.count(".jpg") == 40 and text.count(".txt") == 40  # labels change with annotations


def test_dvc_runs_the_index_when_the_sources_params_change():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "cohort.${cohort.source}" in stages["index"]["params"]
