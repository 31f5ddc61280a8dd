"""Patches as the detect stage sees them: cut like the tile stage, and nuclei joined over edges."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.measure import label, regionprops

from stages import tile
from stages.detectors import Detection, _scoring, _tiles, _windows
from stages.detectors._tiles import Tiling


class Canvas:
    """What the tile stage asks of a slide to cut it."""

    path = Path("canvas")

    def __init__(self, extent, mpp):
        self.width_px, self.height_px = extent
        self.mpp = mpp


def test_patches_lie_where_the_tile_stage_cuts_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        extent = tuple(rng.integers(300, 3000, 2).tolist())
        own, mpp = rng.uniform(0.1, 0.6), rng.uniform(0.25, 1.0)
        settings = tile.TileParams(
            mpp, 31, "random", 9, 13, False, "nuclei", 0.08, 12.0, 2.0, "zstd"
        )
        tiling, wanted = Tiling(mpp, 31), tile._grid(Canvas(extent, own), settings).corners
        assert np.array_equal(tiling.corners(extent, own), wanted)
        width, height = tiling.covered(extent, own)
        assert width <= extent[0] and height <= extent[1]
        assert width == pytest.approx(wanted[:, 0].max() + 31 * mpp / own, abs=1)
        assert height == pytest.approx(wanted[:, 1].max() + 31 * mpp / own, abs=1)


def test_what_is_covered_ends_with_the_image():
    """The second of two patches of 40.3 px begins at 80.6, rounded to 81."""
    assert Tiling(0.65, 31).covered((121, 41), 0.5) == (121, pytest.approx(40.3))


@pytest.mark.parametrize(("mpp", "side"), [(0, 31), (0.5, 0), (0.5, 3.5), (float("nan"), 31)])
def test_refuses_what_cuts_no_patches(mpp, side):
    with pytest.raises(ValueError, match=r"tile\.(mpp|patch_px) is .*: it must be a number"):
        Tiling(mpp, side)


def dark(patches, mpp):
    """Every connected dark region, exactly."""
    for at in range(len(patches)):
        regions = regionprops(label(patches[at][..., 0] < 99))
        centres = [(one.centroid[1] + 0.5, one.centroid[0] + 0.5) for one in regions]
        radius = np.array([one.equivalent_diameter_area / 2 * mpp for one in regions], np.float32)
        score = np.array([one.area for one in regions], np.float32)
        yield Detection(np.array(centres, np.float32).reshape(-1, 2), radius, score)


# Within a patch, over an edge, over a corner of four, cut thinly, and two beside each other that
# an edge keeps apart; patches are 100 px of the image.
DISCS = [(40, 40), (100, 50), (200, 100), (93, 160), (188, 30), (212, 30)]


def drawn(discs=DISCS, radius=10):
    image = np.full((250, 330, 3), 255, np.uint8)
    for x, y in discs:
        cv2.circle(image, (x, y), radius, (0, 0, 0), -1)

    def read(x0, y0, width, height, mpp):
        factor = round(mpp / 0.5)
        part = image[y0 : y0 + height * factor, x0 : x0 + width * factor]
        return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)

    return read


@pytest.mark.parametrize(("mpp", "side"), [(0.5, 100), (1.0, 50)])
def test_pieces_of_a_nucleus_count_once_at_its_middle(mpp, side):
    found = _tiles.detect(drawn(), (330, 250), 0.5, Tiling(mpp, side), dark)
    order = [int(np.hypot(*(found.centroid_px - (x + 0.5, y + 0.5)).T).argmin()) for x, y in DISCS]
    assert sorted(order) == list(range(len(DISCS))) == list(range(len(found.score)))
    np.testing.assert_allclose(found.centroid_px[order], np.array(DISCS) + 0.5, atol=0.6)
    np.testing.assert_allclose(found.radius_um, 0.5 * 10.2, atol=0.3)


def test_the_best_score_of_the_pieces_serves_and_nothing_is_nothing():
    found = _tiles.detect(drawn([(93, 160)]), (330, 250), 0.5, Tiling(0.5, 100), dark)
    pieces = list(dark([drawn([(93, 160)])(x, 100, 100, 100, 0.5) for x in (0, 100)], 0.5))
    assert found.score.tolist() == [max(one.score[0] for one in pieces)]
    halves = _tiles.detect(drawn([(100, 50)]), (330, 250), 0.5, Tiling(0.5, 100), dark)
    assert len(halves.score) == 1
    empty = _tiles.detect(drawn([]), (330, 250), 0.5, Tiling(0.5, 100), dark)
    assert len(empty.score) == 0 and empty.centroid_px.shape == (0, 2)


def test_neighbours_in_one_patch_or_off_the_edge_are_not_pieces():
    """Overlapping, but in one patch, or on both sides of an edge that one circle does not reach."""

    def close(patches, mpp):
        points = [[(97, 80), (95, 86), (95, 20), (88, 50)], [(12, 20), (5, 50)], [], [], [], []]
        for some in points:
            ones = np.ones(len(some), np.float32)
            yield Detection(np.array(some, np.float32).reshape(-1, 2), 5.0 * ones, ones)

    found = _tiles.detect(drawn(), (330, 250), 0.5, Tiling(0.5, 100), close)
    assert len(found.score) == 6


def test_annotations_beyond_the_patches_count_as_hits_only():
    annotated = np.array([[50.0, 50], [303, 100], [310, 30], [20, 220]])
    one = np.ones(2, np.float32)
    found = Detection(np.array([[51, 50], [299, 100]], np.float32), one, one)
    kept, pairs = _scoring.match(found, annotated, 5.0, (300.0, 200.0))
    assert kept.tolist() == [[50, 50], [303, 100]] and pairs.tolist() == [[0, 0], [1, 1]]
    shuffled = annotated[[2, 1, 3, 0]]
    kept, pairs = _scoring.match(found, shuffled, 5.0, (300.0, 200.0))
    assert kept.tolist() == [[303, 100], [50, 50]] and pairs.tolist() == [[0, 1], [1, 0]]


def test_parts_are_read_when_they_are_needed():
    seen = []
    parts = _windows.Parts(lambda *at: seen.append(at), np.array([[0, 3], [7, 9]]), (5, 6), 0.3)
    assert len(parts) == 2 and seen == []
    parts[1]
    assert seen == [(7, 9, 5, 6, 0.3)]
