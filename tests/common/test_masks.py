"""Folders of masks: how they are understood, and those that could be either kind."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from stages.common import annotations
from tests.stages.annotated import SHAPE, as_masks, draw_images, refused


@pytest.fixture
def images(tmp_path) -> Path:
    return draw_images(tmp_path)


def test_refuses_what_is_no_mask(images, tmp_path):
    folder = as_masks(tmp_path, ".png", binary=True, dtype=np.uint8)
    for name in ("a.png", "b.png"):
        soft = cv2.GaussianBlur(discs([255] * 3), (9, 9), 2)
        Image.fromarray(soft).save(folder / name)
    refused(folder, images, r"a.png holds \d+ values, .* pieces: .*threshold soft edges")
    Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(folder / "a.png")
    refused(folder, images, r"a.png is RGB: it must have one channel")
    (folder / "a.png").write_bytes(b"no image")
    refused(folder, images, r"a.png is neither PNG nor TIFF")
    os.rename(folder / "b.png", folder / "c.png")
    refused(folder, images, r"c.png has no image c", FileNotFoundError)


SPOTS = [(40, 40), (90, 60), (150, 100)]


def discs(values: list[int], radius: int = 8) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    for value, spot in zip(values, SPOTS, strict=False):
        cv2.circle(mask, spot, radius, value, -1)
    return mask


def saved(tmp_path: Path, **masks: np.ndarray) -> Path:
    folder = tmp_path / "masks"
    folder.mkdir()
    for name, mask in masks.items():
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


RING = discs([2], 30)
cv2.circle(RING, (44, 38), 9, 1, -1)  # a nucleus within its cell, not in the middle


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"a": [255] * 3, "b": [255, 255, 254]}, r"b.png holds .*254 to 255, and a.png holds 255"),
        ({"a": [255], "b": [255, 254]}, r"b.png holds .*254 to 255, and a.png holds 255 alone"),
        ({"a": [1, 1, 2], "b": [2, 2, 1]}, r"a.png holds 2 values, 1 to 2, and 1 is in 2 pieces"),
        ({"a": [1] * 3, "b": [255] * 3}, r"a.png holds 1, and b.png holds 255"),
    ],
)
def test_refuses_stray_values_and_classes(masks, message, images, tmp_path):
    folder = saved(tmp_path, **{name: discs(values) for name, values in masks.items()})
    refused(folder, images, message + r".*threshold soft edges, stray values and classes")


def test_refuses_classes_one_inside_the_other(images, tmp_path):
    refused(saved(tmp_path, a=RING), images, r"a.png holds 2 values, .* some lie inside others")


@pytest.mark.parametrize("inverted", [255 - discs([255] * 3), np.maximum(discs([2, 3, 4]), 1)])
def test_refuses_masks_whose_background_is_not_0(inverted, images, tmp_path):
    folder = saved(tmp_path, a=inverted, b=discs([255]))
    refused(folder, images, r"a.png is above 0 in \d+% of it and 100% of its edge: 0 must be the")


def test_refuses_two_masks_of_one_image_and_several_pages(images, tmp_path):
    folder = saved(tmp_path, a=discs([255] * 3))
    pages = [Image.fromarray(discs([1])), Image.fromarray(discs([1, 2]))]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    refused(folder, images, r"a.png and a.tif are both masks of a.png: keep one")
    (folder / "a.png").unlink()
    refused(folder, images, r"a.tif has 2 pages: it must have one")


def test_a_few_labels_may_be_split_or_enclosed(images, tmp_path):
    """Of 22 labels one is in two pieces and one inside another, as where nuclei overlap."""
    mask = np.zeros(SHAPE, np.uint8)
    corners = [(x, y) for y in range(5, 170, 60) for x in range(5, 200, 25)][:21]
    for value, (x, y) in enumerate(corners, start=1):
        mask[y : y + 12, x : x + 12] = value
    mask[corners[3][1] + 4, :] = 0
    mask[corners[10][1] + 2 : corners[10][1] + 6, corners[10][0] + 4 : corners[10][0] + 8] = 22
    mask[corners[0][1] + 4, : corners[3][0]] = mask[corners[0][1], : corners[3][0]]
    mask[corners[0][1] + 4, corners[4][0] :] = mask[corners[0][1], corners[4][0] :]
    truth = annotations.read(saved(tmp_path, a=mask), images)
    assert truth.form == "label images" and len(truth.images[0].points) == 22


def test_one_label_in_five_in_two_pieces_is_too_much(images, tmp_path):
    mask = np.zeros(SHAPE, np.uint8)
    for value in range(1, 6):
        mask[20:40, 30 * value : 30 * value + 20] = value
    mask[28, 60:90] = 0
    refused(saved(tmp_path, a=mask), images, r"a.png holds 5 values, 1 to 5, and 2 is in 2 pieces")


def test_labels_may_hang_together_by_corners_lie_in_a_corner_and_fill_the_image(images, tmp_path):
    thin, corner, full = (np.zeros(SHAPE, np.uint8) for _ in range(3))
    for value in (1, 2):
        rows = np.arange(20)
        thin[rows + 5, rows + 30 * value] = value
    corner[:12, :12], full[10:-10, 10:-10] = 2, 1
    corner[:5, :5] = 1
    full[10:-10, 100:-10] = 2
    for mask in (thin, corner, full):
        folder = tmp_path / str(mask.sum())
        folder.mkdir()
        truth = annotations.read(saved(folder, a=mask), images)
        assert (truth.form, len(truth.images[0].points)) == ("label images", 2)


def test_refuses_values_below_0(images, tmp_path):
    folder = as_masks(tmp_path, ".tif", False, np.int32)
    Image.fromarray(discs([1, 2]).astype(np.int32) * -1).save(folder / "a.tif")
    refused(folder, images, r"a.tif holds -2: values must be 0 or above")


def test_single_nuclei_are_alike_as_labels_and_binary(images, tmp_path):
    folder = saved(tmp_path, a=discs([7]), b=discs([9]))
    found = [one.points.tolist() for one in annotations.read(folder, images).images]
    assert found == [[[40.5, 40.5]], [[40.5, 40.5]]]
