"""The rim of a region of pixels as a polygon, for figures."""

import cv2
import numpy as np
from jaxtyping import Bool, Float32


def of(
    mask: Bool[np.ndarray, "height width"], box: tuple[slice, slice]
) -> Float32[np.ndarray, "point 2"]:
    """The edge of the largest piece of a mask, (x, y), along the edges of its pixels.

    OpenCV's polygon runs through the centres of the rim's pixels. On a mask of twice the side these
    lie a quarter of a pixel inside the edge, which is what remains of the difference.

    Args:
        mask: Of the region, at least one pixel.
        box: Rows and columns of the image that the mask is of.
    """
    fine = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    pieces, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = max(pieces, key=cv2.contourArea)[:, 0].astype(np.float32)
    return (largest + 0.5) / 2 + np.array([box[1].start, box[0].start], np.float32)
