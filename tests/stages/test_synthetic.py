import csv
import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openslide
import pytest
from sklearn.metrics import roc_auc_score

from stages.common import perslide
from stages.sources import synthetic
from stages.sources._layout import Crowding, spots

PARAMS = synthetic.Params(
    slides=12,
    width_px=1021,
    height_px=907,
    mpp=0.25,
    positive_share=0.5,
    abnormal_share=0.07,
    cells_per_mm2=350.0,
    neutrophils_per_mm2=120.0,
    cluster_share=0.5,
    empty_share=0.25,
    stain_spread=1.0,
    defocus_um=0.8,
    jpeg_quality=88,
)
EPITHELIAL = ("superficial", "intermediate", "parabasal", "abnormal")


@cache
def drawn(number: int, positive: bool, **changes) -> tuple[np.ndarray, list[synthetic.Truth]]:
    rng = np.random.default_rng([3, number])
    return synthetic.draw(positive, rng, replace(PARAMS, **changes))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    synthetic.make(tmp_path, "syn-003", True, 5, PARAMS)
    return tmp_path


def digest(folder: Path) -> str:
    whole = (folder / "slide.tiff").read_bytes() + (folder / "truth.csv").read_bytes()
    return hashlib.sha256(whole).hexdigest()


def brightness(image: np.ndarray, nucleus: synthetic.Truth, low: float, high: float) -> float:
    """Mean of the darkest channel between two distances, in radii, from a nucleus's centre."""
    reach = int(high * nucleus.radius_px) + 1
    top, left = max(0, int(nucleus.y) - reach), max(0, int(nucleus.x) - reach)
    part = image[top : int(nucleus.y) + reach + 1, left : int(nucleus.x) + reach + 1].min(2)
    rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
    away = np.hypot(columns + left + 0.5 - nucleus.x, rows + top + 0.5 - nucleus.y)
    away /= nucleus.radius_px
    return float(part[(away >= low) & (away < high)].mean())


def test_equal_seeds_give_equal_bytes_and_others_do_not(made, tmp_path_factory):
    for slide_id, seed, same in (("syn-003", 5, True), ("syn-003", 6, False), ("syn-4", 5, False)):
        folder = tmp_path_factory.mktemp("again")
        synthetic.make(folder, slide_id, True, seed, PARAMS)
        assert (digest(folder) == digest(made)) is same


def test_openslide_reads_mpp_power_and_levels(made):
    with openslide.OpenSlide(made / "slide.tiff") as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.25
        assert float(slide.properties["openslide.mpp-y"]) == 0.25
        assert float(slide.properties["openslide.objective-power"]) == 40
        assert slide.level_dimensions == ((1021, 907), (255, 226))
        level0 = np.array(slide.read_region((0, 0), 0, (1020, 904)).convert("RGB"))
        level1 = np.array(slide.read_region((0, 0), 1, (255, 226)).convert("RGB"))
    shrunk = level0.reshape(226, 4, 255, 4, 3).mean((1, 3))
    assert np.abs(shrunk - level1).mean() < 3  # grey levels: the same picture, twice through JPEG
    assert level0.std() > 10


def test_the_file_holds_the_drawn_picture_and_truth(made):
    image, truth = synthetic.draw(True, np.random.default_rng([5, 3]), PARAMS)
    with openslide.OpenSlide(made / "slide.tiff") as slide:
        read = np.array(slide.read_region((0, 0), 0, (1021, 907)).convert("RGB"))
    assert np.abs(read.astype(int) - image).mean() < 3
    with (made / "truth.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == ["slide_id", "x", "y", "radius_px", "kind"]
    assert {row["slide_id"] for row in rows} == {"syn-003"}
    assert [row["kind"] for row in rows] == [nucleus.kind for nucleus in truth]
    found = np.array([[float(row[key]) for key in ("x", "y", "radius_px")] for row in rows])
    wanted = np.array([[nucleus.x, nucleus.y, nucleus.radius_px] for nucleus in truth])
    np.testing.assert_allclose(found, wanted, atol=0.006)


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_nuclei_are_darker_than_what_surrounds_them(mpp):
    image, truth = drawn(1, True, defocus_um=0.0, mpp=mpp)
    cells = [nucleus for nucleus in truth if nucleus.kind in EPITHELIAL]
    darker = [brightness(image, cell, 0, 0.8) < brightness(image, cell, 1.2, 2) for cell in cells]
    assert len(darker) > 10
    assert np.mean(darker) >= 0.9


def test_neutrophils_are_dark_at_their_truth():
    image, truth = drawn(1, True, defocus_um=0.0)
    cells = [nucleus for nucleus in truth if nucleus.kind == "neutrophil"]
    darker = [brightness(image, cell, 0, 1) < brightness(image, cell, 2, 3) for cell in cells]
    assert np.mean(darker) >= 0.8


def test_abnormal_nuclei_are_larger_and_darker():
    size, tone = {True: [], False: []}, {True: [], False: []}
    for number in range(4):
        image, truth = drawn(number, True, defocus_um=0.0, stain_spread=0.0, abnormal_share=0.2)
        for nucleus in truth:
            if nucleus.kind in EPITHELIAL:
                abnormal = nucleus.kind == "abnormal"
                size[abnormal].append(np.pi * (nucleus.radius_px * PARAMS.mpp) ** 2)
                tone[abnormal].append(brightness(image, nucleus, 0, 0.8))
    assert 1.7 < np.mean(size[True]) / np.mean(size[False]) < 5  # area
    assert min(size[True]) > 1.1 * np.median(size[False])
    assert np.mean(tone[True]) < np.mean(tone[False]) - 10  # grey levels


def test_sizes_are_in_microns_whatever_the_resolution():
    for mpp in (0.25, 0.5):
        _, truth = drawn(2, False, mpp=mpp, width_px=1021, height_px=907)
        diameter = [2 * n.radius_px * mpp for n in truth if n.kind == "intermediate"]
        assert 7.3 < np.median(diameter) < 10


def test_negative_slides_hold_nothing_abnormal_and_positive_ones_their_share():
    crowding = Crowding(350.0, 120.0, 0.5, 0.0, 0.25)
    for number in range(5):
        rng = np.random.default_rng(number)
        kinds = [spot.kind for spot in spots(768, 700, crowding, rng)]
        assert "abnormal" not in kinds
        rng = np.random.default_rng(number)
        kinds = [spot.kind for spot in spots(768, 700, replace(crowding, abnormal_share=0.07), rng)]
        epithelial = [kind for kind in kinds if kind != "neutrophil"]
        assert 0.055 < epithelial.count("abnormal") / len(epithelial) < 0.085
        assert "neutrophil" in kinds
    assert all(nucleus.kind != "abnormal" for nucleus in drawn(0, False)[1])


def test_nuclei_do_not_lie_on_one_another():
    truth = spots(500, 400, Crowding(600.0, 300.0, 0.8, 0.1, 0.3), np.random.default_rng(0))
    place = np.array([[spot.x, spot.y] for spot in truth])
    radius = np.array([spot.nucleus_um / 2 for spot in truth])
    gap = np.hypot(*(place[:, None] - place).transpose(2, 0, 1)) + 1e3 * np.eye(len(place))
    assert (gap > radius[:, None] + radius).all()
    assert (place > 0).all() and (place < (500, 400)).all()


def test_mean_colour_does_not_tell_the_label():
    labels = [number % 2 for number in range(40)]
    shape = {"width_px": 509, "height_px": 487, "mpp": 0.5}
    images = [drawn(number, bool(label), **shape)[0] for number, label in enumerate(labels)]
    for channel in np.array([image.mean((0, 1)) for image in images]).T:
        assert 0.25 < roc_auc_score(labels, channel) < 0.75


def test_part_of_the_slide_is_empty():
    image, truth = drawn(0, False, width_px=2039, height_px=1999)
    tiles = {(int(n.x // 256), int(n.y // 256)) for n in truth if n.kind in EPITHELIAL}
    assert 0.2 < len(tiles) / 64 < 0.85


@pytest.mark.parametrize("share", [0.0, 0.07, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("slides", [1, 2, 3, 12, 41])
def test_plan_meets_the_share_and_keeps_patients_whole(slides, share):
    planned = synthetic.plan(replace(PARAMS, slides=slides, positive_share=share), seed=7)
    assert planned == synthetic.plan(replace(PARAMS, slides=slides, positive_share=share), seed=7)
    assert [slide_id for slide_id, _, _ in planned] == [f"syn-{n:03d}" for n in range(slides)]
    positive = sum(label == "positive" for _, label, _ in planned)
    assert abs(positive - share * slides) <= 1  # patients are whole
    longer = synthetic.plan(replace(PARAMS, slides=slides + 5, positive_share=share), seed=7)
    assert longer[:slides] == planned
    labels_of: dict[str, list[str]] = {}
    for _, label, patient in planned:
        labels_of.setdefault(patient, []).append(label)
    assert all(len(set(labels)) == 1 and len(labels) <= 2 for labels in labels_of.values())


def test_plan_has_patients_with_one_and_with_two_slides():
    patients = [patient for _, _, patient in synthetic.plan(replace(PARAMS, slides=20), seed=7)]
    assert {patients.count(patient) for patient in patients} == {1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slides": 0}, "cohort.synthetic.slides is 0: give 1 to"),
        ({"mpp": 0.0}, "cohort.synthetic.mpp is 0.0: give 0.1 to 2"),
        ({"mpp": float("nan")}, "cohort.synthetic.mpp is nan: give 0.1 to 2"),
        ({"positive_share": 1.2}, "cohort.synthetic.positive_share is 1.2: give 0 to 1"),
        ({"abnormal_share": 0.0}, "cohort.synthetic.abnormal_share is 0.0: give 0.001 to 1"),
        ({"jpeg_quality": 101}, "cohort.synthetic.jpeg_quality is 101: give 1 to 100"),
        ({"width_px": 5000, "height_px": 5000}, "draws 5000 x 5000 px, .* at most 16 Mpx"),
    ],
)
def test_refuses_params_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        synthetic.plan(replace(PARAMS, **change), seed=7)


def test_build_lists_what_it_drew(tmp_path, monkeypatch):
    def run_here(stage, make, jobs, target, **_):
        for job in jobs:
            (target / job.slide_id).mkdir(parents=True)
            make(target / job.slide_id, job)

    monkeypatch.setattr(perslide, "run", run_here)
    params = replace(PARAMS, slides=3, width_px=257, height_px=263)
    rows = synthetic.build(params, 7, tmp_path)
    assert [row.slide_id for row in rows] == ["syn-000", "syn-001", "syn-002"]
    assert {row.label for row in rows} == {"negative", "positive"}
    for row in rows:
        assert openslide.OpenSlide(row.path).dimensions == (257, 263)


def test_drawing_needs_nothing_but_its_arguments():
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        np.random.seed(1)
        synthetic.make(Path(first), "syn-000", False, 0, replace(PARAMS, width_px=300))
        np.random.seed(2)
        synthetic.make(Path(second), "syn-000", False, 0, replace(PARAMS, width_px=300))
        assert digest(Path(first)) == digest(Path(second))
