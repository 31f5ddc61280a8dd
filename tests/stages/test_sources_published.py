"""FNAC 2019, and what both published sources share: folders and counts that differ, the index."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import yaml

from stages import cohort as stage
from stages import index
from stages.common import cohort
from stages.sources import fnac2019, nih_malaria
from tests.stages import published
from tests.stages.published import (
    CELLS,
    FIELDS,
    FNAC,
    HIGH,
    ROOT,
    WIDE,
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
def fnac(monkeypatch) -> Path:
    return published.make_fnac(monkeypatch)


@pytest.fixture
def thin(monkeypatch) -> Path:
    return published.make_thin(monkeypatch)


@pytest.fixture
def cells(monkeypatch) -> Path:
    return published.make_cells(monkeypatch)


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
    message = (
        rf"cohort.{source}.mpp is 0 and no published value is known: measure the microns per pixel"
    )
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


def test_images_of_fnac_are_tiled_by_a_sliding_window(fnac):
    use("fnac2019", FNAC, "malignant")
    stage.main()
    (store,) = tiled(cohort.read_rows()[:1], 31, 0.25)
    assert [tuple(map(int, corner)) for corner in store.origin] == [(0, 0), (31, 0)]


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
