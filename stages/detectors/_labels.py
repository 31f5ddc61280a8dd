"""Nuclei measured on a label image: what every network that segments hands over."""

import cv2
import numpy as np
from jaxtyping import Float, Float32, Integer
from scipy.ndimage import find_objects

from stages.detectors import Detection


def measure(
    labels: Integer[np.ndarray, "height width"],
    score: Float[np.ndarray, "height width"] | Float[np.ndarray, " nuclei"],
    mpp: float,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> Detection:
    """Centroid, radius, score and outline of each label.

    Args:
        labels: 0 where there is no nucleus; the others may leave numbers out.
        score: From 0 to 1, of each pixel (its mean over the nucleus is taken), or of each label in
            ascending order.
        mpp: Microns per pixel of the patch.
        zoom: Width and height of a pixel of `labels`, in pixels of the patch.
    """
    numbers, flat = np.unique(labels, return_inverse=True)
    dense = flat.reshape(labels.shape) + int(not (len(numbers) and numbers[0] == 0))
    count = int(dense.max(initial=0))
    y, x = np.nonzero(dense)
    region = dense[y, x]
    area = np.bincount(region, minlength=count + 1)[1:]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(region, values, minlength=count + 1)[1:] / area

    centroid = (np.stack([mean(x), mean(y)], axis=1) + 0.5) * zoom
    outlines = [
        _outline(dense[box] == number, box) * np.array(zoom, np.float32)
        for number, box in enumerate(find_objects(dense), start=1)
    ]
    return Detection(
        centroid.astype(np.float32),
        (np.sqrt(area * zoom[0] * zoom[1] / np.pi) * mpp).astype(np.float32),
        (mean(score[y, x]) if score.ndim == 2 else score).astype(np.float32),
        outlines,
    )


def _outline(mask: np.ndarray, box: tuple[slice, slice]) -> Float32[np.ndarray, "point 2"]:
    """The edge of the largest piece of a mask, (x, y), along the edges of its pixels.

    OpenCV's polygon runs through the centres of the rim's pixels. On a mask of twice the size these
    lie a quarter of a pixel inside the edge, which is what remains of the difference.
    """
    fine = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    pieces, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    largest = max(pieces, key=cv2.contourArea)[:, 0].astype(np.float32)
    return (largest + 0.5) / 2 + np.array([box[1].start, box[0].start], np.float32)
