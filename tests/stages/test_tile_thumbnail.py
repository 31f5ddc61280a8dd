"""The thumbnail that tile draws: which positions are outlined and framed."""

from pathlib import Path

import cv2
import numpy as np

from stages import tile
from stages.common import sampling
from stages.common.slides import Slide


def blank(path: Path, side: int) -> Slide:
    """A square white slide."""
    cv2.imwrite(str(path), np.full((side, side, 3), 255, np.uint8))
    return Slide(path, 0.5)


def test_the_thumbnail_outlines_foreground_and_what_is_out_of_focus(tmp_path):
    where = np.arange(16) == np.array([[5], [10], [3]])
    picture = tile.draw(
        blank(tmp_path / "s.png", 400), sampling.grid((400, 400), 100, 100, 1.0), [5], *where[1:]
    )
    found = {
        name: np.argwhere((picture == colour).all(axis=2)).mean(axis=0) // 100
        for name, colour in (
            ("chosen", tile.CHOSEN_RGB), ("cells", tile.CELLS_RGB), ("blurred", tile.BLURRED_RGB)
        )
    }  # fmt: skip
    assert [found[name].tolist() for name in found] == [[1, 1], [2, 2], [0, 3]]


def test_one_line_runs_around_positions_side_by_side(tmp_path):
    slide = blank(tmp_path / "s.png", 2600)
    grid = sampling.grid((2600, 2600), 100, 100, 0.904)
    every, none = np.ones(len(grid), bool), np.zeros(len(grid), bool)
    picture = tile.draw(slide, grid, np.array([], int), every, none)
    assert (picture == 255).all(axis=2)[3:900, 3:900].all()
    assert (picture[:, 0] == tile.CELLS_RGB).all(axis=1).sum() > 900
