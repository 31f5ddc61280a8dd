"""CellViT's maps cut into nuclei, as HoVer-Net does it.

Inside a nucleus the horizontal and vertical offsets rise from -1 to 1; where two touch, they fall
back. That fall, a steep slope against the rise, is the seam: what remains of the mask without it
are the markers, and a watershed gives the rest of the mask to them.
"""

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int32
from scipy.ndimage import binary_fill_holes, label
from skimage.segmentation import watershed

SEAM = 0.4  # steepness, as a share of the range in the patch, from which on a pixel is no marker
SMALLEST_MASK_PX = 10
MARKER_PX = 5  # side of the ellipse that opens the markers

Map = Float32[np.ndarray, "height width"]


def separate(
    mask: Bool[np.ndarray, "height width"], horizontal: Map, vertical: Map, mpp: float
) -> Int32[np.ndarray, "height width"]:
    """Number the nuclei from 1; 0 is background.

    Args:
        mask: Pixels of nuclei.
        horizontal: Offset from the nucleus' centre to the right, -1 to 1.
        vertical: The same, downwards.
        mpp: Microns per pixel: 0.25 or 0.5, for which the filter's size and the smallest marker
            were published.

    Source: Graham et al. 2019 (HoVer-Net), section 3.2, with the sizes of Hörst et al. 2024.
    """
    kernel_px, smallest_px = (21, 10) if mpp < 0.35 else (11, 3)
    mask = _without_specks(mask, SMALLEST_MASK_PX) > 0
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    slopes = _steepness(horizontal, (1, 0), kernel_px), _steepness(vertical, (0, 1), kernel_px)
    seam = np.where(mask, np.maximum(*slopes), np.float32(0))
    inner = binary_fill_holes(mask & (seam < SEAM)).astype(np.uint8)
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (MARKER_PX, MARKER_PX))
    markers = _without_specks(cv2.morphologyEx(inner, cv2.MORPH_OPEN, ellipse), smallest_px)
    depth = -cv2.GaussianBlur((1 - seam) * mask, (3, 3), 0)
    return watershed(depth, markers, mask=mask).astype(np.int32)


def _without_specks(mask: np.ndarray, least_px: int) -> Int32[np.ndarray, "height width"]:
    """Number the 4-connected parts; those below `least_px` become 0."""
    parts, _ = label(mask)
    kept = np.bincount(parts.ravel()) >= least_px
    return np.where(kept[parts], parts, 0).astype(np.int32)


def _steepness(offsets: Map, direction: tuple[int, int], kernel_px: int) -> Map:
    """How far the offsets fall along the direction: 0 at the steepest rise, 1 at the fall."""
    slope = cv2.Sobel(_stretch(offsets), cv2.CV_64F, *direction, ksize=kernel_px)
    return 1 - _stretch(slope)


def _stretch(values: np.ndarray) -> Map:
    """To 0 to 1."""
    return cv2.normalize(values, None, 0, 1, cv2.NORM_MINMAX, dtype=cv2.CV_32F)
