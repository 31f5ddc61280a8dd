"""Annotated fields searched whole, or in patches as the detect stage sees slides, and matched."""

from collections.abc import Iterator

import cv2
import numpy as np

from stages.common import params
from stages.detectors import Detection, Detector, _batches, _score, _scoring, _tiles, _windows

BATCH = 16  # patches at once

Field = tuple[np.ndarray, np.ndarray]  # uint8 RGB, and the (x, y) of its nuclei


def score(
    detector: Detector, fields: Iterator[Field], mpp: float, radius_px: float
) -> list[_score.Counts]:
    """The outcome of each field."""
    return [
        _score.match(_whole(detector, image, mpp).centroid_px.astype(float), points, radius_px)
        for image, points in fields
    ]


def _whole(detector: Detector, image: np.ndarray, mpp: float) -> Detection:
    run = _batches.of(detector, 1)
    return _windows.detect(_reader(image, mpp), image.shape[1::-1], mpp, run)


def score_tiled(
    detector: Detector, fields: Iterator[Field], mpp: float, radius_px: float
) -> list[_score.Counts]:
    """The outcome of each field that holds a patch, searched as the detect stage sees slides."""
    tile = params.section_of("tile")
    tiling = _tiles.Tiling(max(mpp, tile["mpp"]), tile["patch_px"], tile["codec"])
    run, counts = _batches.of(detector, BATCH), []
    for image, points in fields:
        extent = image.shape[1::-1]
        if len(tiling.corners(extent, mpp)):
            found = _tiles.detect(_reader(image, mpp), extent, mpp, tiling, run)
            kept, pairs = _scoring.match(found, points, radius_px, tiling.covered(extent, mpp))
            counts.append(_score.Counts(len(pairs), len(found.score), len(kept)))
    return counts


def _reader(image: np.ndarray, own_mpp: float) -> _windows.Read:
    """Reads an array as `Slide.read` reads a plain image."""

    def read(x0: int, y0: int, width: int, height: int, mpp: float) -> np.ndarray:
        across, down = (round(side * mpp / own_mpp) for side in (width, height))
        part = image[y0 : y0 + down, x0 : x0 + across]
        if part.shape[1::-1] == (width, height):
            return part
        return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)

    return read
