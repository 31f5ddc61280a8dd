"""The scoring command: every format by hand, whole images and patches, bad input."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import detect_score
from stages.common import annotations
from stages.detectors._scoring import Search
from stages.detectors._tiles import Tiling
from tests.stages.annotated import FORMATS, TRUTH, as_coco, as_csv, as_voc, draw_images

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def images(tmp_path) -> Path:
    return draw_images(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_centres_and_the_counts_by_hand(
    form, images, tmp_path, monkeypatch
):
    """Through the whole command: centres to the pixel, then counts, rates and pictures."""
    source = FORMATS[form](tmp_path)
    for image in annotations.read(source, images).images:
        found = image.points[np.lexsort(image.points.T)]
        wanted = np.array(TRUTH[image.name]) + 0.5
        np.testing.assert_allclose(found, wanted[np.lexsort(wanted.T)], atol=1e-9)
    monkeypatch.chdir(ROOT)
    target = tmp_path / "scores"
    detect_score.main(
        [str(source), "--images", str(images), "--mpp", "0.5", "--target", str(target)]
    )
    rows = list(csv.DictReader((target / "scores.csv").read_text().splitlines()))
    assert [(row["image"], row["tp"], row["fp"], row["fn"]) for row in rows] == [
        ("a.png", "2", "1", "1"),
        ("b.png", "1", "0", "1"),
    ]
    area = 179 * 211 * 0.25e-6
    assert float(rows[0]["false_per_mm2"]) == pytest.approx(1 / area)
    metrics = json.loads((target / "metrics.json").read_text())
    assert (metrics["tp"], metrics["fp"], metrics["fn"]) == (3, 1, 2)
    assert metrics["area_mm2"] == pytest.approx(2 * area)
    pooled, macro = metrics["pooled"], metrics["macro"]
    assert pooled["precision"]["value"] == pytest.approx(3 / 4)
    assert pooled["recall"]["value"] == pytest.approx(3 / 5)
    assert pooled["f1"]["value"] == pytest.approx(2 / 3)
    assert macro["f1"]["value"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert macro["precision"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert pooled["false_per_mm2"]["value"] == pytest.approx(1 / (2 * area))
    with Image.open(target / "gallery.jpg") as gallery:
        assert gallery.width >= 800 and gallery.height >= 400


def command(source: Path, images: Path, tmp_path: Path, *more: str) -> None:
    target = str(tmp_path / "scores")
    detect_score.main([str(source), "--images", str(images), "--target", target, *more])


def test_refuses_annotations_of_another_size(images, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    source = as_voc(tmp_path)
    Image.fromarray(np.zeros((90, 101, 3), np.uint8)).save(images / "a.png")
    with pytest.raises(ValueError, match=r"a.png is 101 by 90 px and was annotated at 211 by 179"):
        command(source, images, tmp_path, "--mpp", "0.5")
    with pytest.raises(ValueError, match=r"a.png is 101 by 90 px and has 2 nuclei outside, one at"):
        command(as_csv(tmp_path), images, tmp_path, "--mpp", "0.5")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mpp", "0.5", "--radius-um", "0"), "--radius-um is 0: it must lie between 0.01 and 50"),
        (("--mpp", "0.5", "--radius-um", "nan"), "--radius-um is nan"),
        (("--mpp", "-1"), "--mpp is -1: it must lie between 0.02 and 40, microns"),
        (("--mpp", "0.6", "--as-tiled"), r"a.png is 0.6 mpp, and 0.5 mpp patches would be inv"),
        (("--mpp", "0.25", "--as-tiled"), r"a.png is 105 by 89 px at 0.5 mpp, smaller than a"),
    ],
)
def test_refuses_scales_that_mean_nothing(more, message, images, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        command(as_csv(tmp_path), images, tmp_path, *more)


@pytest.mark.parametrize("target", ["truth.csv", "truth.csv/below", "/proc/none"])
def test_a_target_that_cannot_be_written_is_told_before_the_work(
    target, images, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(detect_score._scoring, "score", None)
    more = ("--mpp", "0.5", "--target", str(tmp_path / target))
    with pytest.raises(ValueError, match=r"--target .* cannot be written \(.*: name another"):
        command(as_csv(tmp_path), images, tmp_path, *more)


def test_the_last_image_of_another_size_is_told_before_the_work(images, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(detect_score._scoring, "score", None)
    Image.fromarray(np.zeros((90, 101, 3), np.uint8)).save(images / "b.png")
    with pytest.raises(ValueError, match=r"b.png is 101 by 90 px and was annotated at 211 by 179"):
        command(as_voc(tmp_path), images, tmp_path, "--mpp", "0.5")


def test_scores_patches_as_the_detect_stage_sees_them(images, tmp_path, monkeypatch):
    """One patch of 128 px in each field of 211 by 179: of a.png, the third spot is below it."""
    monkeypatch.chdir(ROOT)
    command(as_csv(tmp_path), images, tmp_path, "--mpp", "0.5", "--as-tiled")
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert (metrics["tp"], metrics["fp"], metrics["fn"], metrics["annotated"]) == (3, 0, 1, 4)
    assert metrics["area_mm2"] == pytest.approx(2 * 128**2 * 0.25e-6)
    assert (metrics["tile_mpp"], metrics["patch_px"]) == (0.5, 128)


def test_images_without_annotations_are_told(images, tmp_path, monkeypatch, caplog):
    """An export lists all images, those that nobody came to among them."""
    monkeypatch.chdir(ROOT)
    source = as_coco(tmp_path, "box")
    content = json.loads(source.read_text())
    kept = [entry for entry in content["annotations"] if entry["image_id"] == 0]
    source.write_text(json.dumps({**content, "annotations": kept}))
    command(source, images, tmp_path, "--mpp", "0.5")
    assert "1 of 2 images have no annotation and count as free of nuclei" in caplog.text


def test_the_radius_is_in_microns(images, tmp_path, monkeypatch):
    """The hits are 1.4 px off."""
    monkeypatch.chdir(ROOT)
    for radius_um, hits in (("0.9", 3), ("0.4", 0)):
        command(as_csv(tmp_path), images, tmp_path, "--mpp", "0.5", "--radius-um", radius_um)
        assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["tp"] == hits


def test_patches_run_as_many_at_once_as_in_the_stage_and_windows_of_no_more_pixels():
    whole, tiling = Search(0.5, 4.0, None), Tiling(0.25, 512)
    assert detect_score._batch(16, tiling, Search(0.5, 4.0, tiling)) == 16
    assert [detect_score._batch(patches, tiling, whole) for patches in (1, 16, 21)] == [1, 4, 5]
    with pytest.raises(ValueError, match="detect.batch_patches is 0: it must be 1 or more"):
        detect_score._batch(0, tiling, whole)


def test_scores_real_liquid_cytology(shared_data, tmp_path, monkeypatch, caplog):
    """The published table and masks of 17 fields, at an estimated 0.8 mpp."""
    monkeypatch.chdir(ROOT)
    caplog.set_level("INFO")
    folder = shared_data / "lbc_nuclei_jks43"
    command(folder / "objects.csv", folder, tmp_path, "--mpp", "0.8", "--radius-um", "6.4")
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert (metrics["images"], metrics["annotated"]) == (17, 731)
    f1 = metrics["pooled"]["f1"]
    assert 0.8 < f1["low"] < f1["value"] < f1["high"] < 1
    assert "17 images, 731 nuclei" in caplog.text and "false_per_mm2" in caplog.text
    command(folder / "masks", folder / "images", tmp_path, "--mpp", "0.8", "--radius-um", "6.4")
    again = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert again["annotated"] == 743 and again["pooled"]["f1"]["value"] == pytest.approx(
        f1["value"], abs=0.02
    )
