"""The foregrounds of two peers, as they describe them, in code of our own, for benchmarks.

Both look at the whole slide at low magnification, which is right for tissue.

otsu   TRIDENT without a GPU (trident/segmentation_models/otsu.py): at 1.25x, in windows of 512 px,
       gray and black pixels made white, Otsu's threshold on gray values twice, small objects
       dropped and small holes filled; a patch that touches tissue is kept
clam   CLAM's defaults (create_patches_fp.py): at about 1/64, saturation above 8 after a median of
       7 px, closed by 4 px; its filter by area of contours is left out, which on slides of a
       square millimetre drops everything
"""

import cv2
import numpy as np
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from stages.common.sampling import Grid
from stages.common.slides import Slide

OTSU_MPP, OTSU_WINDOW_PX, OTSU_SMALL_PX, OTSU_HOLES_PX = 8.0, 512, 60, 5000
CLAM_FACTOR, CLAM_SATURATION, CLAM_MEDIAN_PX, CLAM_CLOSE_PX = 64, 8, 7, 4


def otsu(slide: Slide, grid: Grid) -> np.ndarray:
    """Patches that touch what two passes of Otsu's threshold call tissue."""
    image = _shrunk(slide, OTSU_MPP / slide.mpp)
    mask = np.zeros(image.shape[:2], bool)
    for top in range(0, len(image), OTSU_WINDOW_PX):
        for left in range(0, image.shape[1], OTSU_WINDOW_PX):
            part = (slice(top, top + OTSU_WINDOW_PX), slice(left, left + OTSU_WINDOW_PX))
            mask[part] = _otsu_twice(image[part])
    return _touches(mask, slide, grid)


def _otsu_twice(image: np.ndarray) -> np.ndarray:
    saturation, value = np.moveaxis(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), 2, 0)[1:]
    image = image.copy()
    image[(value <= 85) | ((saturation <= 10) & (value >= 70))] = 255
    first = remove_small_objects(_below_otsu(image), max_size=OTSU_SMALL_PX)
    image[~first] = 255
    return remove_small_holes(_below_otsu(image), max_size=OTSU_HOLES_PX)


def _below_otsu(image: np.ndarray) -> np.ndarray:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return gray < threshold_otsu(gray) if np.ptp(gray) else np.zeros(gray.shape, bool)


def clam(slide: Slide, grid: Grid) -> np.ndarray:
    """Patches that touch what is more saturated than a fixed value."""
    saturation = cv2.cvtColor(_shrunk(slide, CLAM_FACTOR), cv2.COLOR_RGB2HSV)[..., 1]
    smooth = cv2.medianBlur(np.ascontiguousarray(saturation), CLAM_MEDIAN_PX)
    kernel = np.ones((CLAM_CLOSE_PX, CLAM_CLOSE_PX), np.uint8)
    mask = cv2.morphologyEx((smooth > CLAM_SATURATION).astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    return _touches(mask > 0, slide, grid)


def _shrunk(slide: Slide, factor: float) -> np.ndarray:
    width, height = (max(1, round(side / factor)) for side in (slide.width_px, slide.height_px))
    return slide.read(0, 0, width, height, slide.mpp * factor)


def _touches(mask: np.ndarray, slide: Slide, grid: Grid) -> np.ndarray:
    scale = np.array(mask.shape[::-1]) / (slide.width_px, slide.height_px)
    first = np.floor(grid.corners * scale).astype(int)
    last = np.ceil((grid.corners + grid.side) * scale).astype(int)
    return np.array(
        [mask[y0:y1, x0:x1].any() for (x0, y0), (x1, y1) in zip(first, last, strict=True)]
    )
