"""Nuclei of an image of any size: in overlapping windows that count each nucleus once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from scipy.spatial import KDTree

from stages.detectors import Detection, _spans

WINDOW_PX = 1024  # images up to this size are given whole
MARGIN_UM = 24.0  # a window sees so far beyond its own part: more than the width of a nucleus
SLACK_UM = 1.0  # two windows may place one nucleus so far apart

# x0, y0 in pixels of the image; width, height, and the mpp of these two, as of `Slide.read`.
Read = Callable[[int, int, int, int, float], UInt8[np.ndarray, "height width 3"]]
# Patches of one size and their mpp to the nuclei of each, as `_batches.Batches`.
Run = Callable[[Sequence[np.ndarray], float], Iterator[Detection]]
Corners = Int64[np.ndarray, "window 2"]  # (x0, y0)


class Parts(Sequence[np.ndarray]):
    """Parts of an image, of one size, read as they are needed."""

    def __init__(self, read: Read, corners: Corners, extent_px: tuple[int, int], mpp: float):
        """`extent_px` is width and height of each part, at `mpp`."""
        self._read, self._corners = read, corners.tolist()
        self._extent, self._mpp = extent_px, mpp

    def __len__(self) -> int:
        """How many."""
        return len(self._corners)

    def __getitem__(self, at: int) -> np.ndarray:  # type: ignore[override]
        """Part `at`, uint8 RGB."""
        return self._read(*self._corners[at], *self._extent, self._mpp)


def windows(
    extent_px: tuple[int, int], mpp: float
) -> tuple[Corners, tuple[int, int], Float64[np.ndarray, "window 2 2"]]:
    """Corners of the windows, their width and height, and of each the part that is its own.

    A part is [(x, y) of its begin, (x, y) of its end]; together they are the image.
    """
    window_px = max(WINDOW_PX, round(8 * MARGIN_UM / mpp))
    (columns, width, own_x), (rows, height, own_y) = (
        _spans.of(side, window_px, round(2 * MARGIN_UM / mpp)) for side in extent_px
    )
    grid = [(x, y) for y in range(len(rows)) for x in range(len(columns))]
    corners = np.array([(columns[x], rows[y]) for x, y in grid])
    own = np.array([np.stack([own_x[x], own_y[y]], axis=1) for x, y in grid])
    return corners, (width, height), own


def detect(read: Read, extent_px: tuple[int, int], mpp: float, run: Run) -> Detection:
    """The nuclei of an image.

    Args:
        read: Gives RGB pixels of a part of the image.
        extent_px: Width and height of the image.
        mpp: Microns per pixel of the image.
        run: Finds the nuclei of each of some patches.

    Returns:
        Positions in pixels of the image, window by window.
    """
    corners, extent, own = windows(extent_px, mpp)
    found = list(run(Parts(read, corners, extent, mpp), mpp))
    parts = [
        taken(one, _inside(one.centroid_px, part, SLACK_UM / mpp))
        for one, part in zip(map(moved, found, corners.astype(float)), own, strict=True)
    ]
    together, window = joined(parts)
    return taken(together, _unique(together, window, 2 * SLACK_UM / mpp))


def _inside(
    points: Float32[np.ndarray, "nuclei 2"], part: Float64[np.ndarray, "2 2"], slack_px: float
) -> Bool[np.ndarray, " nuclei"]:
    return ((points >= part[0] - slack_px) & (points < part[1] + slack_px)).all(axis=1)


def _unique(
    found: Detection, window: Int64[np.ndarray, " nuclei"], radius_px: float
) -> Bool[np.ndarray, " nuclei"]:
    """False for those that another window saw too, with a higher score."""
    kept = np.ones(len(found.score), bool)
    if len(kept):
        close = KDTree(found.centroid_px).query_pairs(radius_px, output_type="ndarray")
        close = close[window[close[:, 0]] != window[close[:, 1]]]
        first, second = close.T
        kept[np.where(found.score[first] < found.score[second], first, second)] = False
    return kept


def moved(found: Detection, by: Float64[np.ndarray, " 2"], scale: float = 1.0) -> Detection:
    """Nuclei of a part as those of the image: positions times `scale`, moved by (x, y)."""
    outlines = found.outline_px and [
        (outline * scale + by).astype(np.float32) for outline in found.outline_px
    ]
    centroid = (found.centroid_px.astype(np.float64) * scale + by).astype(np.float32)
    return replace(found, centroid_px=centroid, outline_px=outlines)


def taken(found: Detection, kept: Bool[np.ndarray, " nuclei"]) -> Detection:
    """Some of the nuclei."""
    outlines = found.outline_px and [found.outline_px[at] for at in np.flatnonzero(kept)]
    arrays = [found.centroid_px[kept], found.radius_um[kept], found.score[kept]]
    return Detection(*arrays, outline_px=outlines)


def joined(parts: list[Detection]) -> tuple[Detection, Int64[np.ndarray, " nuclei"]]:
    """All nuclei of some parts, and the row in `parts` of each; outlines where all have them."""
    outlines = [part.outline_px for part in parts]
    names = ("centroid_px", "radius_um", "score")
    together = Detection(
        *[np.concatenate([getattr(part, name) for part in parts]) for name in names],
        outline_px=None if None in outlines else [one for some in outlines for one in some],
    )
    return together, np.repeat(np.arange(len(parts)), [len(part.score) for part in parts])
