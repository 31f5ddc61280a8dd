"""Images of any size in overlapping windows: each nucleus once, junk at their edges never."""

import numpy as np
import pytest

from stages.detectors import Detection, _batches, _windows


class Dots:
    """Finds dark pixels, one each, and says which window saw it by nothing."""

    version, device = "dots", "cpu"

    def __call__(self, patches, mpp):
        y, x = np.nonzero(patches[0, ..., 0] < 99)
        centres = np.stack([x, y], axis=1).astype(np.float32) + 0.5
        ones = np.ones(len(x), np.float32)
        return [Detection(centres, 2 * ones, ones, [centre[None] for centre in centres])]


def test_windows_give_each_nucleus_of_a_large_image_once():
    rng = np.random.default_rng(2)
    grid = np.stack(np.meshgrid(np.arange(3, 2531, 13), np.arange(4, 1801, 13)), -1).reshape(-1, 2)
    points = np.unique(grid + rng.integers(-2, 3, grid.shape), axis=0)
    image = np.full((1811, 2539, 3), 255, np.uint8)
    image[points[:, 1], points[:, 0]] = 0
    seen = []

    def read(x0, y0, width, height, mpp):
        seen.append((width, height))
        return image[y0 : y0 + height, x0 : x0 + width]

    found = _windows.detect(read, (2539, 1811), 0.5, _batches.Batches(Dots(), 1))
    assert len(seen) > 4 and set(seen) == {(1024, 1024)}
    order = np.lexsort(found.centroid_px.T)
    assert np.array_equal(found.centroid_px[order], points[np.lexsort(points.T)] + 0.5)
    assert np.array_equal(np.concatenate(found.outline_px), found.centroid_px)


def unread(x0, y0, width, height, mpp):
    return np.array([[[x0, y0, width]]])


def nuclei(points: list, score: float = 0.5) -> Detection:
    centres = np.array(points, np.float32).reshape(-1, 2)
    ones = np.ones(len(centres), np.float32)
    return Detection(centres, 2 * ones, score * ones)


@pytest.mark.parametrize(
    ("extent", "mpp"), [((5003, 1000), 0.5), ((1024, 1025), 0.25), ((5750, 700), 0.5)]
)
def test_own_parts_of_windows_fill_the_image_far_from_the_windows_edges(extent, mpp):
    corners, side, own = _windows.windows(extent, mpp)
    assert side == tuple(min(1024, length) for length in extent)
    assert np.prod(own[:, 1] - own[:, 0], axis=1).sum() == np.prod(extent)
    for corner, (begin, end) in zip(corners, own, strict=True):
        assert (corner >= 0).all() and (corner + side <= extent).all()
        inner = np.stack([begin - corner, corner + side - end])
        at_border = np.stack([begin == 0, end == extent])
        assert (inner[~at_border] >= 24 / mpp - 0.5).all() and (inner[at_border] == 0).all()
    # No more than needed: at 1024 px a window, overlapping by 48 um.
    each = [1 if n <= 1024 else -(-(n - 48 / mpp) // (1024 - 48 / mpp)) for n in extent]
    assert len(corners) == np.prod(each)


def test_windows_grow_where_pixels_are_small():
    """At 0.1 mpp 1024 px would be 102 um; eight margins are 192 um."""
    assert _windows.windows((4001, 900), 0.1)[1] == (1920, 900)


def test_what_only_the_edges_of_windows_show_is_dropped():
    """Every window reports its four corners; those of the image remain."""

    def junk(patches, mpp):
        for at in range(len(patches)):
            width = patches[at][0, 0, 2]
            yield nuclei([(1, 1), (width - 1, 1), (1, width - 1), (width - 1, width - 1)])

    found = _windows.detect(unread, (2500, 2500), 0.5, junk)
    assert sorted(found.centroid_px.tolist()) == [[1, 1], [1, 2499], [2499, 1], [2499, 2499]]


@pytest.mark.parametrize("scores", [(0.2, 0.7), (0.7, 0.2)])
@pytest.mark.parametrize(("apart_um", "left"), [(1.8, 1), (2.2, 0)])
def test_a_nucleus_on_a_seam_counts_once_by_its_higher_score(apart_um, left, scores):
    """Each window places it in the other's part: up to 1 um off the seam it is kept."""
    (_, second), _, own = _windows.windows((1500, 100), 0.5)
    seam, half = own[1, 0, 0], apart_um / 2 / 0.5

    def seen(patches, mpp):
        yield nuclei([(seam + half, 50)], scores[0])
        yield nuclei([(seam - half - second[0], 50)], scores[1])

    found = _windows.detect(unread, (1500, 100), 0.5, seen)
    assert len(found.score) == left
    best = seam + half if scores[0] > scores[1] else seam - half
    for centre, score in zip(found.centroid_px, found.score, strict=True):
        assert (*centre, score) == pytest.approx((best, 50, 0.7), abs=1e-3)


def test_one_window_may_see_two_that_are_close():
    def seen(patches, mpp):
        yield nuclei([(600, 50), (600.5, 50)])
        yield nuclei([])

    assert len(_windows.detect(unread, (1500, 100), 0.5, seen).score) == 2


def test_memory_that_runs_out_halves_the_windows_at_once():
    sizes = []

    class Picky:
        version, device = "picky", "cpu"

        def __call__(self, patches, mpp):
            sizes.append(len(patches))
            if len(patches) > 2:
                raise MemoryError
            return [nuclei([(500, 50)]) for _ in patches]

    def read(x0, y0, width, height, mpp):
        return np.zeros((height, width, 3), np.uint8)

    found = _windows.detect(read, (4500, 100), 0.5, _batches.Batches(Picky(), 8))
    assert sizes[0] == 5 and set(sizes[1:]) <= {1, 2} and len(found.score) == 5
