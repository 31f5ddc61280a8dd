"""The classical detector on stains, light and scales it was not tuned to, and its outlines."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from stages.common import params
from stages.detectors import Detection, _score, hematoxylin

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
    "very pale": lambda image: 255 * (image / 255) ** 0.25,
    "gray": lambda image: image.mean(axis=2, keepdims=True).repeat(3, axis=2),
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


@pytest.mark.parametrize("ratio", [1.5, 2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("dark", [1, 3, 10, 30])
def test_a_few_dark_nuclei_hide_no_pale_ones(dark, ratio):
    """Of 121, some are `ratio` times as dense as the others."""
    rng = np.random.default_rng(0)
    places = [(x, y) for x in range(20, 512, 48) for y in range(20, 512, 48)]
    image = np.full((512, 512, 3), GLASS, np.uint8)
    chosen = set(rng.permutation(len(places))[:dark].tolist())
    for number, place in enumerate(places):
        share = 0.45 * rng.uniform(0.85, 1.15) * (ratio if number in chosen else 1)
        colour = np.array(GLASS) * (np.array(NUCLEUS) / GLASS) ** share
        cv2.circle(image, place, 14, colour.round().tolist(), -1, cv2.LINE_AA)
    noisy = cv2.GaussianBlur(image, (0, 0), 1.5) + rng.normal(0, 3, image.shape)
    nuclei = found(noisy.clip(0, 255).astype(np.uint8), 0.25)
    counts = _score.match(nuclei.centroid_px.astype(float), np.array(places) + 0.5, 8.0)
    assert counts.recall >= 0.9 and counts.precision == 1.0


@pytest.mark.parametrize(("radius", "pitch"), [(2.1, 5.0), (2.3, 5.5), (2.8, 6.1), (3.0, 6.5)])
def test_small_nuclei_side_by_side_on_glass_stay_apart(radius, pitch):
    places = np.arange(6.0, 56.0, pitch)
    discs = [(x, y, radius) for x in places for y in places]
    nuclei = found(smear(discs))
    counts = _score.match(centres_um(nuclei).astype(float), np.array(discs)[:, :2], 1.0)
    assert (counts.precision, counts.recall) == (1, 1)
    assert nuclei.radius_um == pytest.approx(radius, rel=0.15)


def test_lobes_in_one_cell_are_one_and_on_glass_they_are_not():
    """Two parts 1.2 um apart: their middle, their common area, an outline around both."""
    lobes = [(27.0, 30.0, 2.5), (33.2, 30.0, 2.5)]
    alone = found(smear(lobes))
    cell = found(paint(paint(smear([]), [(30.1, 30.0, 8.0)], 0.5, CELL), lobes, 0.5, NUCLEUS))
    assert len(alone.score) == 2 and len(cell.score) == 1
    assert np.abs(centres_um(cell)[0] - (30.1, 30.0)).max() < 0.2
    assert cell.radius_um[0] == pytest.approx(2.5 * np.sqrt(2), rel=0.1)
    width_um = np.ptp(cell.outline_px[0], axis=0) * 0.5
    assert np.abs(width_um - (11.2, 5.0)).max() < 0.6


def test_the_rim_of_a_patch_costs_a_nucleus_no_height():
    """Cut by the edge, it scores as if it were whole; so does it beside an edge of the picture."""
    whole = found(smear([(30.0, 30.0, 4.0)])).score[0]
    for place in ((0.5, 30.0), (30.0, 60.0), (4.2, 30.0)):
        assert found(smear([(*place, 4.0)])).score[0] > 0.85 * whole


def test_blue_counts_and_pale_counts_less_in_the_score():
    """Two nuclei of like red and green, one with less blue: it scores higher."""
    image = paint(smear([(20.0, 20.0, 4.0)]), [(44.0, 44.0, 4.0)], 0.5, (*NUCLEUS[:2], 200))
    image = paint(image, [(44.0, 16.0, 4.0)], 0.5, (130, 120, 165))
    nuclei = found(image)
    assert len(nuclei.score) == 3
    plain, bluer, paler = (
        nuclei.score[np.hypot(*(nuclei.centroid_px * 0.5 - place).T).argmin()]
        for place in ((20.0, 20.0), (44.0, 44.0), (44.0, 16.0))
    )
    assert paler < plain - 0.02 and plain < bluer - 0.02


def test_an_uneven_surround_lowers_the_score():
    rough = smear([])
    speckle = np.random.default_rng(2).normal(0, 1, rough.shape[:2])
    speckle = cv2.GaussianBlur(speckle, (0, 0), 1.5)
    ground = (rough * (1 + 0.25 * speckle[..., None] / speckle.std())).clip(0, 255)
    disc = [(30.0, 30.0, 4.0)]
    even = found(smear(disc)).score[0]
    nuclei = found(paint(ground.astype(np.uint8), disc, 0.5, NUCLEUS))
    nearest = np.hypot(*(nuclei.centroid_px * 0.5 - 30).T).argmin()
    assert nuclei.score[nearest] < even - 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_radius_um": 0.12}, "min_radius_um is 0.12: it must be at least 0.5"),
        ({"max_radius_um": 51.0}, "max_radius_um is 51.0: it must be above .* at most 50"),
        ({"max_radius_um": float("nan")}, "max_radius_um is nan"),
        ({"merge_um": 18.1}, "merge_um is 18.1: it must be at most twice max_radius_um"),
        ({"min_blueness": float("nan")}, "min_blueness is nan: it must be above 0"),
    ],
)
def test_params_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"detect.hematoxylin.{message}"):
        replace(PARAMS, **changes)


def test_the_extremes_of_params_and_bytes_run_through():
    """Least and greatest radii, on noise of every value, on stripes of 0 and 255, and a pixel."""
    rng = np.random.default_rng(4)
    noise = rng.integers(0, 256, (67, 61, 3), np.uint8)
    stripes = np.zeros((67, 61, 3), np.uint8)
    stripes[:, ::7] = 255
    for changes in ({"min_radius_um": 0.5}, {"max_radius_um": 50.0, "merge_um": 100.0}):
        detector = hematoxylin.build(replace(PARAMS, **changes))
        for image in (noise, stripes, noise[:1, :1]):
            nuclei = detector(image[None], 0.25)[0]
            assert np.isfinite(nuclei.centroid_px).all() and np.isfinite(nuclei.score).all()


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
