"""The picture of hits, misses and false alarms: what is chosen, what part is shown, and where."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Circle, Polygon

from stages.detectors import Detection, _gallery
from stages.detectors._gallery import Scored


def scored(
    found=(), annotated=(), pairs=(), extent=(400, 300), mpp=0.5, name="a.png", outlines=None
) -> Scored:
    centres = np.array(found, np.float32).reshape(-1, 2)
    ones = np.ones(len(centres), np.float32)
    detection = Detection(centres, 3 * ones, ones, outlines)
    points = np.array(annotated, float).reshape(-1, 2)
    pairs = np.array(pairs, int).reshape(-1, 2)
    return Scored(name, Path(name), extent, mpp, detection, points, pairs, 1.0)


def with_f1(hits: int, of: int) -> Scored:
    """`hits` of `of` annotated are found, nothing else."""
    points = [(9 * at, 5) for at in range(of)]
    return scored(points[:hits], points, [(at, at) for at in range(hits)], name=f"{hits}.png")


def test_some_of_all_and_more_with_errors_from_best_to_worst():
    perfect = [with_f1(9, 9) for _ in range(60)]
    images = [*perfect[:30], *[with_f1(at, 40) for at in range(1, 40)], *perfect[30:]]
    chosen = [one.counts.f1 for one in _gallery._chosen(images)]
    assert chosen == sorted(chosen, reverse=True) and 8 < len(chosen) <= 12
    assert chosen[0] == 1.0 and chosen[-1] == images[30].counts.f1
    erring = [f1 for f1 in chosen if f1 < 1]
    assert len(erring) >= 8 and images[68].counts.f1 in erring, "the best with errors too"
    assert _gallery._chosen(images[:12]) == images[:12]


@pytest.mark.parametrize("count", [13, 14, 17, 20, 61])
def test_more_images_than_fit_fill_the_picture(count):
    images = [with_f1(at, 70) for at in range(1, count + 1)]
    chosen = [one.counts.f1 for one in _gallery._chosen(images)]
    assert len(chosen) == 12 and len(set(chosen)) == len(chosen)
    assert chosen[0] == images[-1].counts.f1 and chosen[-1] == images[0].counts.f1


def test_the_part_shown_holds_the_most_errors_and_lies_in_the_image():
    """240 um at 0.5 mpp are 480 px; three misses and a false alarm are together far from one."""
    misses = [(100, 100), (1800, 900), (1900, 950), (1700, 980)]
    hits = [(100 + at, 500) for at in range(9)]
    pairs = [(1 + at, 4 + at) for at in range(9)]
    one = scored([(1850, 990), *hits], [*misses, *hits], pairs, (2000, 1000))
    assert _gallery._view(one) == (1520, 520, 480, 480)  # at the image's corner
    x0, y0, width, height = _gallery._view(scored([(100, 500)], misses[:1], (), (2000, 1000)))
    assert (x0, y0, width, height) in [(0, 0, 480, 480), (0, 260, 480, 480)]
    hits = [(1000, 500)]
    assert _gallery._view(scored(hits, hits, [(0, 0)], (2000, 1000))) == (760, 260, 480, 480)


@pytest.mark.parametrize(
    ("extent", "mpp", "side"),
    [
        ((3000, 3000), 0.02, (2048, 2048)),  # 12,000 px would be 240 um
        ((3000, 3000), 20.0, (64, 64)),
        ((8, 2000), 0.5, (8, 480)),
    ],
)
def test_the_part_shown_has_a_bearable_number_of_pixels(extent, mpp, side):
    assert _gallery._view(scored(extent=extent, mpp=mpp))[2:] == side


def test_shapes_stand_where_the_nuclei_are():
    """Radius 3 um at 0.5 mpp is 6 px, drawn 1.3 times as large."""
    shapes = _gallery._shapes(scored([(90, 80), (10, 20)], [(12, 20), (50, 60)], [(1, 0)]))
    (hit,), (false,), (miss,) = (
        shapes[color] for color in (_gallery.HIT, _gallery.FALSE, _gallery.MISS)
    )
    assert isinstance(hit, Circle) and tuple(hit.center) == (10, 20)
    assert hit.radius == pytest.approx(7.8)
    assert false.xy == pytest.approx((90, 80)) and miss.xy == pytest.approx((50, 60))
    assert false.radius == pytest.approx(1.4 * 7.8) == miss.radius
    assert (false.orientation, miss.orientation) == (0, np.pi / 4)  # a diamond, a square


def test_errors_are_those_in_no_pair():
    one = scored([(1, 1)] * 3, [(1, 1)] * 4, [(0, 3), (2, 1)])
    missed, false = _gallery._errors(one)
    assert missed.tolist() == [0, 2] and false.tolist() == [1]


def test_outlines_are_drawn_where_there_are_any():
    corners = np.array([[4, 4], [8, 4], [6, 9]], np.float32)
    one = scored([(6, 5)], [(6, 5)], [(0, 0)], outlines=[corners])
    (hit,) = _gallery._shapes(one)[_gallery.HIT]
    assert isinstance(hit, Polygon) and np.array_equal(hit.get_xy()[:3], corners)


def white(one, x0, y0, width, height):
    return np.full((height, width, 3), 255, np.uint8)


def share(picture: np.ndarray, color: str) -> float:
    wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return float((np.abs(picture.astype(int) - wanted).max(axis=2) < 25).mean())


def test_hits_misses_and_false_alarms_are_drawn_in_their_colors():
    """In the legend all three; more of each color where there is such a nucleus."""
    plain = _gallery.draw([scored()], white, "t")
    for color, one in {
        _gallery.HIT: scored([(200, 150)], [(200, 150)], [(0, 0)]),
        _gallery.FALSE: scored([(200, 150)]),
        _gallery.MISS: scored((), [(200, 150)]),
    }.items():
        picture = _gallery.draw([one], white, "t")
        for other in _gallery.LABELS:
            ratio = share(picture, other) / share(plain, other)
            assert ratio > 1.2 if other == color else ratio < 1.2


@pytest.mark.parametrize("extent", [(3, 60_000), (60_000, 3), (1, 1)])
def test_thin_images_make_a_picture_of_bearable_size(extent):
    picture = _gallery.draw([scored(extent=extent)] * 12, white, "t")
    assert max(picture.shape) < 2500 and picture.dtype == np.uint8


def test_a_title_is_no_formula():
    """A name with dollars, which matplotlib would read as one that is wrong."""
    _gallery.draw([scored(name="$1^{$.png")], white, "$x_{$")
