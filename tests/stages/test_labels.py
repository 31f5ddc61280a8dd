"""Label images to nuclei: centres, radii, scores and outlines, at any scale."""

import cv2
import numpy as np
import pytest

from stages.detectors._labels import measure


def discs(*numbers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Discs with these labels, and their true centres (x, y) and radii in pixels."""
    labels = np.zeros((97, 113), np.int32)
    centres = np.array([(21.5, 30.5), (70.25, 20.0), (60.0, 71.75)])[: len(numbers)]
    radii = np.array([7.0, 9.5, 12.0])[: len(numbers)]
    y, x = np.mgrid[:97, :113] + 0.5
    for number, (cx, cy), radius in zip(numbers, centres, radii, strict=True):
        labels[np.hypot(x - cx, y - cy) <= radius] = number
    return labels, centres, radii


def test_centres_are_continuous_and_radii_of_equal_area():
    labels, centres, radii = discs(1, 2, 3)
    found = measure(labels, np.ones(3), 0.5)
    assert np.abs(found.centroid_px - centres).max() < 0.1
    area = np.array([(labels == number).sum() for number in (1, 2, 3)])
    assert found.radius_um == pytest.approx(np.sqrt(area / np.pi) * 0.5)
    assert found.radius_um == pytest.approx(radii * 0.5, abs=0.1)
    assert {found.centroid_px.dtype, found.radius_um.dtype, found.score.dtype} == {
        np.dtype(np.float32)
    }


def test_one_pixel_by_hand():
    labels = np.zeros((5, 7), np.int64)
    labels[2, 4] = 9
    found = measure(labels, np.ones(1), 0.5)
    assert found.centroid_px.tolist() == [[4.5, 2.5]]
    assert found.radius_um == pytest.approx(0.5 / np.sqrt(np.pi))
    assert found.outline_px[0].min(axis=0).tolist() == [4.25, 2.25]
    assert found.outline_px[0].max(axis=0).tolist() == [4.75, 2.75]


def test_labels_may_leave_numbers_out_and_fill_the_image():
    labels, centres, _ = discs(7, 900, 41)
    found = measure(labels, np.array([0.1, 0.2, 0.3]), 0.5)  # of 7, 41 and 900
    assert found.score == pytest.approx([0.1, 0.2, 0.3])
    assert np.abs(found.centroid_px - centres[[0, 2, 1]]).max() < 0.1
    assert measure(np.full((4, 6), 5), np.ones(1), 1.0).centroid_px.tolist() == [[3, 2]]


def test_a_map_of_scores_is_averaged_over_each_nucleus():
    labels, _, _ = discs(1, 2)
    probability = np.where(labels == 1, 0.25, 0.75)
    rows = np.arange(97) % 2
    assert measure(labels, probability, 0.5).score == pytest.approx([0.25, 0.75])
    striped = measure(labels, np.repeat(rows[:, None], 113, axis=1).astype(float), 0.5).score
    assert striped == pytest.approx([0.5, 0.5], abs=0.05)


def test_outlines_run_around_their_nucleus():
    labels, centres, radii = discs(1, 2, 3)
    for outline, centre, radius in zip(
        measure(labels, np.ones(3), 0.5).outline_px, centres, radii, strict=True
    ):
        assert np.hypot(*(outline - centre).T) == pytest.approx(radius - 0.25, abs=0.75)
        assert cv2.contourArea(outline) == pytest.approx(np.pi * (radius - 0.25) ** 2, rel=0.06)


def test_the_outline_is_that_of_the_largest_piece():
    labels = np.zeros((20, 20), np.uint8)
    labels[2:4, 2:4] = labels[8:16, 9:15] = 1
    (outline,) = measure(labels, np.ones(1), 0.5).outline_px
    assert outline.min(axis=0).tolist() == [9.25, 8.25]
    assert outline.max(axis=0).tolist() == [14.75, 15.75]


def test_coarser_labels_are_mapped_to_the_patch():
    labels, centres, radii = discs(1, 2, 3)
    found = measure(labels, np.ones(3), 0.25, zoom=(2.0, 3.0))
    assert np.abs(found.centroid_px - centres * (2, 3)).max() < 0.25
    assert found.radius_um == pytest.approx(radii * np.sqrt(6) * 0.25, abs=0.1)
    x, y = found.outline_px[0].mean(axis=0)
    assert abs(x - 43) < 1 and abs(y - 91.5) < 1.5


def test_no_label_is_no_nucleus():
    found = measure(np.zeros((5, 7), np.int32), np.zeros((5, 7)), 0.5)
    assert found.centroid_px.shape == (0, 2) and found.outline_px == []
    assert found.radius_um.shape == found.score.shape == (0,)
