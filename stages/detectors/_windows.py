"""Nuclei of an image of any size: whole, or in overlapping windows that count each nucleus once."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy.spatial import KDTree

from stages.detectors import Detection, Detector

WINDOW_PX = 1024  # images up to this size are given whole
MARGIN_UM = 24.0  # a window sees so far beyond its own part: more than the width of a nucleus
SLACK_UM = 1.0  # two windows may place one nucleus so far apart

Read = Callable[[int, int, int, int], UInt8[np.ndarray, "height width 3"]]  # x0, y0, width, height


def detect(read: Read, width_px: int, height_px: int, mpp: float, detector: Detector) -> Detection:
    """The nuclei of an image.

    Args:
        read: Gives RGB pixels of a part of the image.
        width_px: Of the image.
        height_px: Of the image.
        mpp: Microns per pixel of the image.
        detector: See `stages.detectors.Detector`.

    Returns:
        Positions in pixels of the image, window by window.
    """
    parts, origins = [], []
    for y0, height, rows in _spans(height_px, mpp):
        for x0, width, columns in _spans(width_px, mpp):
            found = detector(read(x0, y0, width, height)[None], mpp)[0]
            moved = _moved(found, np.array([x0, y0], np.float32))
            parts.append(_taken(moved, _inside(moved.centroid_px, columns, rows, SLACK_UM / mpp)))
            origins.append(np.full(len(parts[-1].score), len(origins)))
    together = _joined(parts)
    return _taken(together, _unique(together, np.concatenate(origins), 2 * SLACK_UM / mpp))


def _spans(length: int, mpp: float) -> list[tuple[int, int, tuple[float, float]]]:
    """(start, length, the part that is its own) of each window along one axis."""
    side = max(WINDOW_PX, round(8 * MARGIN_UM / mpp))
    if length <= side:
        return [(0, length, (0.0, float(length)))]
    overlap = round(2 * MARGIN_UM / mpp)
    count = -(-(length - overlap) // (side - overlap))
    starts = np.linspace(0, length - side, count).round().astype(int)
    edges = [0.0, *((starts[:-1] + side + starts[1:]) / 2).tolist(), float(length)]
    ends = zip(edges[:-1], edges[1:], strict=True)
    return [(start, side, own) for start, own in zip(starts.tolist(), ends, strict=True)]


def _inside(
    points: Float32[np.ndarray, "nuclei 2"],
    columns: tuple[float, float],
    rows: tuple[float, float],
    slack_px: float,
) -> Bool[np.ndarray, " nuclei"]:
    low, high = np.array([columns, rows]).T
    return ((points >= low - slack_px) & (points < high + slack_px)).all(axis=1)


def _unique(found: Detection, window: np.ndarray, radius_px: float) -> Bool[np.ndarray, " nuclei"]:
    """False for those that another window saw too, with a higher score."""
    kept = np.ones(len(found.score), bool)
    if len(kept):
        close = KDTree(found.centroid_px).query_pairs(radius_px, output_type="ndarray")
        close = close[window[close[:, 0]] != window[close[:, 1]]]
        first, second = close.T
        kept[np.where(found.score[first] < found.score[second], first, second)] = False
    return kept


def _moved(found: Detection, by: Float32[np.ndarray, " 2"]) -> Detection:
    outlines = found.outline_px and [outline + by for outline in found.outline_px]
    return replace(found, centroid_px=found.centroid_px + by, outline_px=outlines)


def _taken(found: Detection, kept: Bool[np.ndarray, " nuclei"]) -> Detection:
    outlines = found.outline_px and [found.outline_px[at] for at in np.flatnonzero(kept)]
    arrays = [found.centroid_px[kept], found.radius_um[kept], found.score[kept]]
    return Detection(*arrays, outline_px=outlines)


def _joined(parts: list[Detection]) -> Detection:
    outlines = [part.outline_px for part in parts]
    names = ("centroid_px", "radius_um", "score")
    return Detection(
        *[np.concatenate([getattr(part, name) for part in parts]) for name in names],
        outline_px=None if None in outlines else [one for some in outlines for one in some],
    )
