"""COCO files: centroids by definition, and what is wrong with a file."""

import json
from pathlib import Path

import numpy as np
import pytest

from stages.common import annotations, coco
from tests.stages.annotated import draw_images, refused, runs_of


@pytest.fixture
def images(tmp_path) -> Path:
    return draw_images(tmp_path)


IMAGE = {"id": 1, "file_name": "a.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [{"id": True}], "annotations": []}, r"images\[0\] has no id"),
        ([], "has no list 'images': it must be COCO"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] has no file_name"),
        ({"images": [IMAGE, IMAGE], "annotations": []}, r"images\[1\]: id 1 is there twice"),
        ({"images": [IMAGE], "annotations": [{"image_id": 2}]}, "image_id is 2: no image"),
        ({"images": [IMAGE], "annotations": [{"image_id": 1}]}, r"bbox is None: it must be 4"),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1, "segmentation": [[1, 2, 3]]}]},
            "has 3 numbers",
        ),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1, "iscrowd": 1, "bbox": [1] * 4}]},
            "is a crowd",
        ),
        (
            {
                "images": [IMAGE],
                "annotations": [{"image_id": 1, "segmentation": {"size": [3, 5], "counts": [9]}}],
            },
            r"runs that do not fill its size \[3, 5\]",
        ),
    ],
)
def test_names_what_is_wrong_with_coco(content, message, images, tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(content))
    refused(tmp_path / "truth.json", images, message)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"images": 1e999}', "\udcff"])
def test_refuses_what_is_no_json(text, images, tmp_path):
    (tmp_path / "truth.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path / "truth.json", images, "truth.json (is no JSON|has no list)")


def test_centroid_of_runs_and_polygons_by_definition():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = (rng.uniform(size=(7, 11)) < 0.4).astype(np.uint8)
        mask[0, :2] = rng.integers(0, 2, 2)
        mask[3, 3] = 1
        runs = runs_of(mask, packed=False)
        if mask[0, 0]:
            runs["counts"] = [0, *runs["counts"]]
        y, x = np.nonzero(mask)
        centre, extent = coco._of_runs(runs, "")
        assert centre == pytest.approx((x.mean() + 0.5, y.mean() + 0.5)) and extent == (11, 7)
    two = [[0, 0, 4, 0, 4, 2, 0, 2], [10, 10, 10, 12, 12, 12, 12, 10]]  # areas 8 and 4, turned
    assert coco._of_polygons(two, "") == pytest.approx(((2 * 8 + 11 * 4) / 12, (8 + 44) / 12))


def of_one(tmp_path: Path, entry: dict, image: dict = IMAGE) -> Path:
    content = {"images": [image], "annotations": [{"image_id": 1, **entry}]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return tmp_path / "truth.json"


def point_of(source: Path, images: Path) -> list[float]:
    return annotations.read(source, images).images[0].points[0].tolist()


SIZED = {**IMAGE, "width": 211, "height": 179}
RUNS = [9 * 179 + 20, 5, 179 * 211 - 9 * 179 - 25]


@pytest.mark.parametrize(
    ("size", "runs", "message"),
    [
        ([211, 179], RUNS, r"a.png is said to be 211 by 179 px wide and high, and 179 by 211"),
        ([179, 105.5], RUNS, r"size is '105.5': it must be a whole number"),
        ([179, 211], [RUNS[0] + 0.5, 5, RUNS[2] - 0.5], r"counts is '1631.5': it must be a whole"),
        ([1e200, 1e200], RUNS, r"size is '1e\+200'"),
        ([179, 211], "o" * 100, r"counts is damaged"),
    ],
)
def test_refuses_runs_of_another_image(size, runs, message, images, tmp_path):
    entry = {"segmentation": {"size": size, "counts": runs}}
    refused(of_one(tmp_path, entry, SIZED), images, message)


def test_runs_tell_the_extent_where_the_image_does_not(images, tmp_path):
    source = of_one(tmp_path, {"segmentation": {"size": [179, 211], "counts": RUNS}})
    assert annotations.read(source, images).images[0].extent_px == (211, 179)
    assert point_of(source, images) == [9.5, 22.5]


def test_an_outline_that_crosses_itself_has_the_middle_of_what_it_encloses(images, tmp_path):
    """Against every pixel's side of it; by the shoelace formula its loops would cancel."""
    bow = [0, 0, 60, 60, 60, 0, 40, 0, 40, 60, 0, 60]
    inside = np.zeros((600, 600), bool)
    y, x = np.mgrid[:600, :600] / 10 + 0.05
    corners = np.array(bow).reshape(-1, 2)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    found = point_of(of_one(tmp_path, {"segmentation": [bow]}), images)
    assert found == pytest.approx((x[inside].mean(), y[inside].mean()), abs=0.15)


def test_an_outline_of_very_many_corners_costs_little(images, tmp_path, monkeypatch):
    """No edge is compared with every other."""
    monkeypatch.setattr(coco, "_crosses", None)
    turn = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    circle = np.stack([70 + 20 * np.cos(turn), 60 + 30 * np.sin(turn)], axis=1)
    source = of_one(tmp_path, {"segmentation": [circle.ravel().tolist()]})
    assert point_of(source, images) == pytest.approx((70, 60), abs=0.3)


def test_a_hollow_outline_that_does_not_cross_itself_is_exact(images, tmp_path):
    """An L of two squares and their corner, of 3 by 1, 1 by 2 px."""
    corners = [0, 0, 3, 0, 3, 1, 1, 1, 1, 3, 0, 3]
    found = point_of(of_one(tmp_path, {"segmentation": [corners]}), images)
    assert found == pytest.approx(((3 * 1.5 + 2 * 0.5) / 5, (3 * 0.5 + 2 * 2) / 5), abs=1e-12)


@pytest.mark.parametrize("outline", [None, {}, [], [[]]])
def test_the_box_serves_where_the_outline_is_empty(outline, images, tmp_path):
    source = of_one(tmp_path, {"segmentation": outline, "bbox": [32, 30, 16, 12]})
    assert point_of(source, images) == [40.0, 36.0]


def test_ids_may_be_floats_and_annotations_come_once(images, tmp_path):
    source = of_one(tmp_path, {"image_id": 1.0, "bbox": [1, 2, 4, 4]}, {**IMAGE, "id": 1})
    assert point_of(source, images) == [3.0, 4.0]
    content = json.loads(source.read_text())
    content["annotations"] *= 3
    source.write_text(json.dumps(content))
    refused(source, images, r"truth.json has 3 nuclei at x 3, y 4 of image a.png: .*copies out")
    source.write_text('{"images": [], "images": [{"id": 1}], "annotations": []}')
    refused(source, images, r"truth.json is no JSON: 'images' comes twice")


def test_refuses_numbers_beyond_any_image(images, tmp_path):
    corners = [1e200, 0, 1e200, 1e200, 0, 1e200]
    refused(of_one(tmp_path, {"segmentation": [corners]}), images, r"segmentation is '1e\+200'")
