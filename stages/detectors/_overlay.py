"""A contact sheet of a slide's patches with their nuclei drawn, for people.

Nothing here is in the cache key of the nuclei: an edit changes the sheets of slides that are
detected from then on, not those that are there.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from stages.common.pictures import write_jpeg
from stages.detectors import Detection

SHEET_COLUMNS = 4
SHEET_PATCHES = SHEET_COLUMNS**2
SHEET_PX = 320  # side of a patch
MARK_RGB = (0, 140, 70)
FINE = 4  # bits of OpenCV's positions below the pixel


def write(file: Path, patches: Sequence[np.ndarray], found: list[Detection], mpp: float) -> None:
    """Write the sheet: patches from the fullest to the emptiest, in equal steps of rank.

    Raises:
        ValueError: there are no patches.
    """
    if not found:
        raise ValueError("there are no patches, and one is needed at least: run `dvc repro tile`")
    ranked = np.argsort([-len(one.score) for one in found], kind="stable")
    chosen = ranked[np.unique(np.linspace(0, len(ranked) - 1, SHEET_PATCHES).astype(int))]
    pictures = [_marked(patches[row], found[row], mpp) for row in chosen.tolist()]
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % SHEET_COLUMNS)
    lines = [pictures[at : at + SHEET_COLUMNS] for at in range(0, len(pictures), SHEET_COLUMNS)]
    write_jpeg(file, np.vstack([np.hstack(line) for line in lines]))


def _marked(
    patch: UInt8[np.ndarray, "height width 3"], nuclei: Detection, mpp: float
) -> UInt8[np.ndarray, "px px 3"]:
    """Outlines where the detector gives them, else circles a little wider than the nuclei."""
    zoom = SHEET_PX / len(patch)
    way = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(patch, (SHEET_PX, SHEET_PX), interpolation=way)
    if nuclei.outline_px is not None:
        # OpenCV counts from the centre of the first pixel.
        lines = [((line * zoom - 0.5) * 2**FINE).round().astype(int) for line in nuclei.outline_px]
        return cv2.polylines(picture, lines, True, MARK_RGB, 2, cv2.LINE_AA, FINE)
    for (x, y), radius_um in zip(nuclei.centroid_px, nuclei.radius_um, strict=True):
        centre = round(float(x) * zoom), round(float(y) * zoom)
        cv2.circle(picture, centre, round(float(radius_um) / mpp * zoom) + 2, MARK_RGB, 2)
    return picture
