"""Positions of patches: where they lie, what they hold, and which are drawn."""

import numpy as np
import pytest

from stages.common import embedding, sampling


@pytest.mark.parametrize("step", [20, 33, 64, 100])
@pytest.mark.parametrize("scale", [1.0, 1.93])
def test_sums_are_those_of_the_points_within_each_position(step, scale):
    rng = np.random.default_rng(step)
    grid = sampling.grid((1111, 777), 64, step, scale)
    x, y, weights = rng.uniform(0, 1111, 400), rng.uniform(0, 777, 400), rng.random(400)
    for places in (grid, grid.middle(64)):
        wanted = [
            weights[
                (x >= left) & (x < left + places.side) & (y >= top) & (y < top + places.side)
            ].sum()
            for left, top in places.corners
        ]
        assert np.allclose(places.sums(x, y, weights), wanted)


def test_positions_end_with_the_slide():
    grid = sampling.grid((300, 130), 64, 64, 2.0)
    assert grid.corners.tolist() == [[0, 0], [128, 0]] and len(grid) == 2
    assert len(sampling.grid((127, 300), 64, 64, 2.0)) == 0


@pytest.mark.parametrize("patch_px", [128, 61, 62, 64, 7])
def test_the_middle_is_what_embed_crops(patch_px):
    place = np.arange(patch_px, dtype=np.uint8)
    crop = embedding.central_half(np.broadcast_to(place, (1, patch_px, patch_px))[..., None])
    start, side = sampling.middle_px(patch_px)
    assert crop[0, 0, :, 0].tolist() == list(range(start, start + side))


def test_a_draw_depends_on_its_key_alone():
    candidates = np.arange(1000) % 3 == 0
    first = sampling.draw(candidates, 20, "7:a")
    assert np.array_equal(first, sampling.draw(candidates, 20, "7:a"))
    assert not np.array_equal(first, sampling.draw(candidates, 20, "7:b"))
    assert (np.diff(first) > 0).all() and candidates[first].all() and len(first) == 20
    assert np.array_equal(sampling.draw(candidates, 0, "7:a"), np.flatnonzero(candidates))


def test_densest_keeps_the_order_of_the_slide_and_of_equals_the_first():
    area = np.array([5.0, 9, 9, 1, 9, 99])
    candidates = np.array([True, True, True, True, True, False])
    assert sampling.densest(candidates, 2, area).tolist() == [1, 2]
    assert sampling.densest(candidates, 4, area).tolist() == [0, 1, 2, 4]
    assert sampling.densest(candidates, 0, area).tolist() == [0, 1, 2, 3, 4]
