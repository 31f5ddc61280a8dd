"""What a patch takes on the disk, measured on a few of the user's own slides before they are tiled.

Patches are taken where the slides are most crowded, as foreground is. Where no slide can be read,
figures of BENCHMARKS.md stand in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from stages.common import cohort, footprint, patches
from stages.common.cohort import SlideRow
from stages.common.footprint import APART, PATCHES, Cut
from stages.common.slides import Slide

OVERVIEW_PX = 1024
# Without slides to look at: bytes a pixel, the upper end of what was measured.
STORED = {"jpeg": 0.25, "zstd": 1.8}
SHUFFLED = 2.0


@dataclass(frozen=True)
class Sample:
    """What was found."""

    slides: int  # that were looked at; 0: none could be read
    patches: float  # of a slide, at most
    stored: float  # bytes of a patch in the tile store
    shuffled: float  # bytes of a perturbed one


def look(rows: Sequence[SlideRow], cut: Cut) -> Sample:
    """Look at some of the slides; one that cannot be read is left to the stage tile to tell of."""
    counts, stored, shuffled = [], [], []
    for row in footprint.some(rows):
        try:
            slide = Slide(cohort.locate(row.path), float(row.mpp))
            pixels = list(_crowded(slide, cut))
        except (ValueError, OSError):
            continue
        counts.append(positions(slide, cut))
        stored += map(len, patches.encoded(pixels, cut.codec, cut.patch_px))
        shuffled += footprint.shuffled_lengths(pixels)
    if not stored:
        area = cut.patch_px**2
        return Sample(0, cut.patches_per_slide, STORED[cut.codec] * area, SHUFFLED * area)
    return Sample(len(counts), *(float(np.mean(found)) for found in (counts, stored, shuffled)))


def positions(slide: Slide, cut: Cut) -> int:
    """How many patches are cut from a slide at most."""
    step = cut.patch_px if cut.sampling in APART else cut.stride_px
    sides = (slide.width_px, slide.height_px)
    columns, rows = (
        max(0, int((side * slide.mpp / cut.mpp - cut.patch_px) // step) + 1) for side in sides
    )
    return min(columns * rows, cut.patches_per_slide or columns * rows)


def _crowded(slide: Slide, cut: Cut) -> Iterator[UInt8[np.ndarray, "px px 3"]]:
    """Patches where the slide varies most; spread over it where all are taken."""
    overview = cv2.cvtColor(slide.thumbnail(OVERVIEW_PX), cv2.COLOR_RGB2GRAY).astype(np.float32)
    side = cut.patch_px * cut.mpp / slide.mpp
    columns, rows = (max(1, int(length / side)) for length in (slide.width_px, slide.height_px))
    squares, means = (
        cv2.resize(values, (columns, rows), interpolation=cv2.INTER_AREA)
        for values in (overview**2, overview)
    )
    order = (squares - means**2).ravel().argsort(kind="stable")[::-1]
    if cut.sampling == "all":
        order = order[np.linspace(0, len(order) - 1, PATCHES).astype(int)]
    for at in order[:PATCHES].tolist():
        x0, y0 = int(at % columns * side), int(at // columns * side)
        yield slide.read(x0, y0, cut.patch_px, cut.patch_px, cut.mpp)
