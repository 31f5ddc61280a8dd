"""Where a slide holds cells: found at 10x or finer, window by window, in bounded memory.

A thumbnail's tissue mask loses isolated nuclei or keeps the whole slide. Here every nucleus is
looked for (stages/common/blobs.py); the slide becomes a list of cells and a coarse map of what is
stained and how sharp it is, from which positions of any grid are judged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float64

from stages.common import blobs
from stages.common.blobs import Blobs, View
from stages.common.slides import Slide

MPP = 1.0  # 10x; a slide that is coarser is looked at as it is
WINDOW_PX = (1024, 2048)  # width and height: pixels in memory at a time, but for the margin
MARGIN_UM = 64.0  # more than a nucleus, a disk of ink, and what they are judged by reach
SQUARE_UM = 16.0  # of the map, at most: half a patch where that is less
THUMBNAIL_PX = 1024
GLASS_PERCENTILE = 90  # cytology slides are mostly bright and empty
STAINED = 0.05  # optical density above glass of what is no glass
GRAY = 12  # gray values by which the channels differ at most in a slide without colour


class Settings(Protocol):
    """What decides; see stages/tile.py."""

    foreground: Literal["nuclei", "cells"]
    foreground_od: float
    mpp: float
    patch_px: int


@dataclass(frozen=True)
class Squares:
    """The map, a row a square."""

    x: Float64[np.ndarray, " square"]  # centre, level-0 pixels
    y: Float64[np.ndarray, " square"]
    area_um2: Float64[np.ndarray, " square"]
    stained_um2: Float64[np.ndarray, " square"]
    once: Float64[np.ndarray, " square"]  # sums of what stages/common/focus.py gives
    again: Float64[np.ndarray, " square"]


@dataclass(frozen=True)
class Survey:
    """What a slide holds."""

    cells: Blobs  # sharp or not; x and y in level-0 pixels
    squares: Squares


def survey(slide: Slide, settings: Settings) -> Survey:
    """Look at the whole slide once.

    Raises:
        ValueError: the file is damaged.
    """
    um = max(MPP, slide.mpp)
    square = max(1, round(min(SQUARE_UM, settings.patch_px * settings.mpp / 2) / um))
    thumbnail = slide.thumbnail(THUMBNAIL_PX)
    white = np.percentile(thumbnail, GLASS_PERCENTILE, axis=(0, 1))
    gray = bool(np.ptp(thumbnail.astype(int), axis=2).max() <= GRAY)
    found, mapped = [], []
    for window in _windows(slide, um, square):
        seen = blobs.view(window.read(slide, um), white, um)
        if settings.foreground == "nuclei":
            some = blobs.nuclei(seen, settings.foreground_od, gray)
        else:
            some = blobs.cells(seen, settings.foreground_od, square, gray)
        found.append(window.located(some, um / slide.mpp))
        mapped.append(window.mapped(seen, square, um / slide.mpp))
    return Survey(Blobs(*_joined(found)), Squares(*_joined(mapped)))


def _joined(parts: list[Blobs] | list[Squares]) -> list[np.ndarray]:
    return [
        np.concatenate(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)
    ]


@dataclass(frozen=True)
class _Window:
    """A part of the slide with a margin around, in working pixels."""

    inner: tuple[int, int, int, int]  # left, top, right, bottom
    outer: tuple[int, int, int, int]

    def read(self, slide: Slide, um: float) -> np.ndarray:
        left, top, right, bottom = self.outer
        corner = (round(side * um / slide.mpp) for side in (left, top))
        return slide.overview(*corner, right - left, bottom - top, um)

    def located(self, some: Blobs, scale: float) -> Blobs:
        """Those whose centre is not in the margin, in level-0 pixels."""
        left, top, right, bottom = self.inner
        x, y = some.x + self.outer[0], some.y + self.outer[1]
        mine = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        return Blobs(x * scale, y * scale, some.area_um2, some.blur_um)[mine]

    def mapped(self, seen: View, square: int, scale: float) -> Squares:
        left, top, right, bottom = self.inner
        rows = slice(top - self.outer[1], bottom - self.outer[1])
        columns = slice(left - self.outer[0], right - self.outer[0])
        stained = seen.highest[rows, columns] > STAINED
        images = (np.ones_like(stained), stained, *(edge[rows, columns] for edge in seen.edges))
        area, full, once, again = (blobs.block_sums(image, square) for image in images)
        y, x = (
            np.minimum((np.arange(count) + 0.5) * square + start, end - 0.5)
            for count, start, end in zip(area.shape, (top, left), (bottom, right), strict=True)
        )
        place = (axis.ravel() * scale for axis in np.meshgrid(x, y))
        sums = (area * seen.um**2, full * seen.um**2, once, again)
        return Squares(*place, *(one.ravel() for one in sums))


def _windows(slide: Slide, um: float, square: int) -> Iterator[_Window]:
    width, height = (
        max(1, int(side * slide.mpp / um)) for side in (slide.width_px, slide.height_px)
    )
    margin = round(MARGIN_UM / um / square + 1) * square  # squares must not be cut by windows
    step = [side // square * square for side in WINDOW_PX]
    for top in range(0, height, step[1]):
        for left in range(0, width, step[0]):
            right, bottom = min(left + step[0], width), min(top + step[1], height)
            outer = (left - margin, top - margin, right + margin, bottom + margin)
            low, high = (0, 0), (width, height)
            clipped = (
                *np.maximum(outer[:2], low).tolist(),
                *np.minimum(outer[2:], high).tolist(),
            )
            yield _Window((left, top, right, bottom), clipped)
