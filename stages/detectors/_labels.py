"""Nuclei measured on a label image: what every network that segments hands over."""

import numpy as np
from jaxtyping import Float, Integer
from scipy.ndimage import find_objects

from stages.detectors import Detection, _outlines


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
        _outlines.of(dense[box] == number, box) * np.array(zoom, np.float32)
        for number, box in enumerate(find_objects(dense), start=1)
    ]
    return Detection(
        centroid.astype(np.float32),
        (np.sqrt(area * zoom[0] * zoom[1] / np.pi) * mpp).astype(np.float32),
        (mean(score[y, x]) if score.ndim == 2 else score).astype(np.float32),
        outlines,
    )
