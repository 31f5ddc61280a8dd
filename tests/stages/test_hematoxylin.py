"""The classical detector on stains, light and scales it was not tuned to, and its outlines."""

import cv2
import numpy as np
import pytest

from stages.common import params
from stages.detectors import Detection, hematoxylin

PARAMS = params.load(hematoxylin.Params, "detect.hematoxylin")
GLASS, CELL, NUCLEUS = (235, 230, 238), (200, 165, 190), (85, 75, 130)
DISCS = [(20.0, 19.0, 3.5), (46.0, 41.0, 5.0)]


@pytest.fixture(autouse=True)
def one_thread():
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


def paint(image: np.ndarray, discs: list, mpp: float, colour: tuple[int, int, int]) -> np.ndarray:
    """Discs given as (x, y, radius) in microns, their rims smoothed by eight-fold drawing."""
    fine = np.repeat(np.repeat(image, 8, axis=0), 8, axis=1)
    rows, columns = ((np.arange(side) + 0.5) / 8 * mpp for side in fine.shape[:2])
    for x, y, radius in discs:
        fine[np.hypot(columns[None] - x, rows[:, None] - y) <= radius] = colour
    return cv2.resize(fine, image.shape[1::-1], interpolation=cv2.INTER_AREA)


def smear(discs: list, mpp: float = 0.5, colour=NUCLEUS, ground=GLASS) -> np.ndarray:
    side = round(61 / mpp)
    return paint(np.full((side, side, 3), ground, np.uint8), discs, mpp, colour)


def found(image: np.ndarray, mpp: float = 0.5) -> Detection:
    return hematoxylin.build(PARAMS)(image[None], mpp)[0]


def centres_um(nuclei: Detection, mpp: float = 0.5) -> np.ndarray:
    return nuclei.centroid_px[np.argsort(nuclei.radius_um)] * mpp


CHANGES = {
    "dim": lambda image: image * 0.4,
    "tinted": lambda image: image * (0.6, 0.85, 1.0),
    "veiled": lambda image: image * 0.5 + 90,
    "pale": lambda image: 255 * (image / 255) ** 0.4,
    "strong": lambda image: 255 * (image / 255) ** 1.8,
    "grayish": lambda image: image * 0.5 + image.mean(axis=2, keepdims=True) * 0.5,
    "noisy": lambda image: image + np.random.default_rng(1).normal(0, 10, image.shape),
    "blurred": lambda image: cv2.GaussianBlur(image, (0, 0), 2.0),
    "unevenly lit": lambda image: image * np.linspace(1, 0.5, image.shape[1])[:, None],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_light_stain_and_focus_change_nothing(change):
    image = change(smear(DISCS).astype(float)).clip(0, 255).round().astype(np.uint8)
    nuclei = found(image)
    assert len(nuclei.score) == 2
    assert np.abs(centres_um(nuclei) - np.array(DISCS)[:, :2]).max() < 0.4


@pytest.mark.parametrize("stated", [0.4, 0.6])
def test_a_scale_wrong_by_a_fifth_loses_no_nucleus(stated):
    nuclei = found(smear(DISCS), stated)
    assert np.abs(centres_um(nuclei) - np.array(DISCS)[:, :2]).max() < 0.4
    assert np.sort(nuclei.radius_um) == pytest.approx(np.array([3.5, 5.0]) * stated / 0.5, rel=0.15)


@pytest.mark.parametrize("mpp", [0.25, 0.5])
@pytest.mark.parametrize("beyond", [-0.2, 0.0, 0.5])
def test_finds_a_nucleus_that_the_edge_cuts(mpp, beyond):
    """Its centre is a share of the radius inside the edge, on it, or outside."""
    radius = 4.5
    nuclei = found(smear([(beyond * radius, 30.0, radius)], mpp), mpp)
    assert len(nuclei.score) == 1
    assert nuclei.centroid_px[0, 1] * mpp == pytest.approx(30, abs=0.3)
    assert 0 < nuclei.centroid_px[0, 0] * mpp < radius


def test_a_reddish_nucleus_counts_in_a_cell_and_not_on_glass():
    """As dense in blue as in red: a red cell where it lies alone, a nucleus where a cell is."""
    disc = (30.0, 30.0, 4.0)
    cell = paint(smear([]), [(30.0, 30.0, 22.0)], 0.5, CELL)
    inside = (np.array(CELL) * 10 ** -np.array([0.30, 0.5, 0.30])).round()
    alone = (np.array(GLASS) * 10 ** -np.array([0.30, 0.5, 0.30])).round()
    assert len(found(paint(cell, [disc], 0.5, inside)).score) == 1
    assert len(found(smear([disc], colour=alone)).score) == 0


def test_the_rounder_of_two_scores_higher():
    image = smear([(20.0, 20.0, 4.0)])
    cv2.ellipse(image, (85, 85), (12, 6), 30, 0, 360, NUCLEUS, -1, cv2.LINE_AA)
    nuclei = found(image)
    score = nuclei.score[np.argsort(nuclei.centroid_px[:, 0])]
    circle, ellipse = score / (1 - score)  # the qualities
    assert ellipse / circle == pytest.approx(np.sqrt(6 / 12), rel=0.05)


@pytest.mark.parametrize("cell", [1, 2, 5, 16, 37])
def test_finds_nothing_in_chequered_noise(cell):
    board = np.indices((256, 256)).sum(axis=0) // cell % 2
    gray = np.where(board[..., None], 120, 230).repeat(3, axis=2)
    noise = np.random.default_rng(cell).normal(0, 8, gray.shape)
    assert len(found((gray + noise).clip(0, 255).astype(np.uint8)).score) == 0


def test_finds_five_thousand_nuclei_and_one():
    grid = np.arange(8.0, 8 + 71 * 12, 12.0)
    image = np.full((1720, 1720, 3), GLASS, np.uint8)
    for x in grid:
        for y in grid:
            cv2.circle(image, (int(x * 2), int(y * 2)), 6, NUCLEUS, -1, cv2.LINE_AA)
    nuclei = found(image)
    assert len(nuclei.score) == len(nuclei.outline_px) == 71**2
    assert len(found(smear(DISCS[:1])).score) == 1


@pytest.mark.parametrize("mpp", [0.13, 0.25, 0.5, 0.8])
def test_outlines_enclose_the_area_that_the_radius_tells(mpp):
    nuclei = found(smear(DISCS, mpp), mpp)
    for outline, centre, radius in zip(
        nuclei.outline_px, nuclei.centroid_px, nuclei.radius_um, strict=True
    ):
        assert outline.dtype == np.float32 and outline.ndim == 2
        area = cv2.contourArea(outline) * mpp**2
        assert np.sqrt(area / np.pi) == pytest.approx(radius, rel=0.1)
        moments = cv2.moments(outline)
        middle = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
        assert np.abs(middle - centre).max() * mpp < 0.1


def test_blank_and_dark_patches_have_an_empty_list_of_outlines():
    for gray in (0, 255):
        nuclei = found(np.full((67, 61, 3), gray, np.uint8))
        assert nuclei.outline_px == [] and nuclei.radius_um.shape == (0,)
